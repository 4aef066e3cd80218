#include <ATen/ATen.h>

#include <budwood/peft/models/attend.h>
#include <budwood/peft/ops/attention.h>
#include <budwood/quant/error.h>
#include <cmath>

namespace budwood::models {

double attention_scale(int64_t head_dim) {
  return 1.0 / std::sqrt(static_cast<double>(head_dim));
}

int64_t prefix_tokens(const AttentionSlot& adapters) {
  const auto prefix = adapters->prefix();
  return prefix.k.defined() ? prefix.k.size(0) : 0;
}

void require_one_length(const TokenBatch& batch) {
  if (batch.sequences() < 1 || batch.longest() * batch.sequences() != batch.tokens())
    throw Error("hidden", "sequences that share a cache have one length");
}

at::Tensor token_positions(const AttentionSlot& adapters, const TokenBatch& batch,
                           bool from_start) {
  const int64_t moved = adapters->position_shift();
  const int64_t shift = from_start ? moved : moved - prefix_tokens(adapters);
  return shift == 0 ? batch.positions : batch.positions + shift;
}

at::Tensor attend(const AttentionPart& part, const AttentionSlot& adapters, const at::Tensor& q,
                  at::Tensor k, at::Tensor v, const TokenBatch& batch, KvCache* cache,
                  const std::function<KeyValues(const at::Tensor&)>& project,
                  const std::function<at::Tensor()>& hidden) {
  const bool starts = !cache || cache->length() == 0;
  const auto prefix = starts && adapters->gates_prefix()
                          ? adapters->prefix(hidden(), batch.layout(starts))
                          : adapters->prefix();
  const int64_t prefixed = prefix.k.defined() ? prefix.k.size(-3) : 0;
  int64_t before = prefixed;  // keys ahead of a sequence's own
  if (prefixed > 0 && starts) {
    k = with_prefix(prefix.k, k, batch.cu_seqlens);
    v = with_prefix(prefix.v, v, batch.cu_seqlens);
  }
  if (cache) {
    const int64_t n = batch.sequences();
    const auto shaped = [&](const at::Tensor& t) { return t.view({n, -1, t.size(1), t.size(2)}); };
    const auto [all_k, all_v] = cache->append(part.layer, shaped(k), shaped(v));
    before = all_k.size(1) - q.size(0) / n;
    k = all_k.reshape({-1, k.size(1), k.size(2)});
    v = all_v.reshape({-1, v.size(1), v.size(2)});
  }
  ops::AttentionShape shape{.cu_q = batch.cu_seqlens,
                            .cu_k = batch.cu_seqlens,
                            .scale = attention_scale(q.size(2)),
                            .window = part.window,
                            .causal = part.causal,
                            .prefix = part.causal ? prefixed : 0};
  for (size_t s = 0; s < shape.cu_k.size(); ++s) shape.cu_k[s] += static_cast<int64_t>(s) * before;
  const auto out = ops::attention(q, k, v, shape);
  if (!part.adds_beside || !adapters->has_active()) return out;
  return adapters->beside(out, {q, shape.scale, project});
}

}  // namespace budwood::models
