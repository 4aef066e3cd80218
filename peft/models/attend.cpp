#include <ATen/ATen.h>

#include <budwood/peft/models/attend.h>
#include <budwood/peft/models/key_value_tape.h>
#include <budwood/peft/ops/attention.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <cmath>

namespace budwood::models {
namespace {

// Keeps keys and values of a whole batch.
void keep(KeyValueTape& tape, int64_t layer, const at::Tensor& k, const at::Tensor& v) {
  tape.layers.resize(std::max(tape.layers.size(), static_cast<size_t>(layer) + 1));
  tape.layers[static_cast<size_t>(layer)] = {k.contiguous(), v.contiguous()};
}

}  // namespace

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

namespace {

// Attention of some tokens to the keys of all, those of the tokens themselves being computed anew:
// q, k, v [selected, heads or kv_heads, head_dim] -> [selected, heads, head_dim].
at::Tensor attend_to_tape(const AttentionPart& part, const at::Tensor& q, const at::Tensor& k,
                          const at::Tensor& v, const TokenBatch& batch, const KeyValueTape& tape) {
  const auto& kept = tape.layers.at(static_cast<size_t>(part.layer));
  const auto keys = kept.k.index_copy(0, tape.rows, k), values = kept.v.index_copy(0, tape.rows, v);
  const int64_t heads = q.size(1), kv_heads = k.size(1), dim = q.size(2), group = heads / kv_heads;
  std::vector<at::Tensor> results;
  for (int64_t s = 0; s < batch.sequences(); ++s) {
    const auto at = static_cast<size_t>(s);
    const auto own = [&](const at::Tensor& t) {
      return t.slice(0, batch.cu_seqlens[at], batch.cu_seqlens[at + 1]);
    };
    const auto all = [&](const at::Tensor& t) {
      return t.slice(0, tape.cu_seqlens[at], tape.cu_seqlens[at + 1]);
    };
    const auto queries = own(q);
    const int64_t n = queries.size(0);
    // [kv_heads, group * n, dim] against [kv_heads, tokens, dim].
    const auto grouped =
        queries.view({n, kv_heads, group, dim}).permute({1, 2, 0, 3}).reshape({kv_heads, -1, dim});
    auto scores = grouped.bmm(all(keys).permute({1, 2, 0})).to(at::kFloat) * attention_scale(dim);
    const auto mine = own(batch.positions).unsqueeze(1), theirs = all(tape.positions).unsqueeze(0);
    auto hidden = part.causal ? theirs > mine : at::zeros_like(theirs > mine);
    if (part.window > 0) hidden = hidden.logical_or(mine - theirs >= part.window);
    scores = scores.masked_fill(hidden.repeat({group, 1}).unsqueeze(0), -HUGE_VAL);
    const auto weights = scores.softmax(-1).to(values.scalar_type());
    results.push_back(weights.bmm(all(values).transpose(0, 1))
                          .view({kv_heads, group, n, dim})
                          .permute({2, 0, 1, 3})
                          .reshape({n, heads, dim}));
  }
  return at::cat(results);
}

}  // namespace

at::Tensor attend(const AttentionPart& part, const AttentionSlot& adapters, const at::Tensor& q,
                  at::Tensor k, at::Tensor v, const TokenBatch& batch, KvCache* cache,
                  const std::function<KeyValues(const at::Tensor&)>& project,
                  const std::function<at::Tensor()>& hidden) {
  if (batch.tape && batch.tape->rows.defined())
    return attend_to_tape(part, q, k, v, batch, *batch.tape);
  if (batch.tape) keep(*batch.tape, part.layer, k, v);
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
