#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/ops/attention.h>
#include <budwood/quant/error.h>

namespace budwood::ops {
namespace {

// [sequences, heads, t, d] from rows laid end to end, key heads repeated for grouped queries.
at::Tensor heads_first(const at::Tensor& rows, int64_t sequences, int64_t heads) {
  const int64_t t = rows.size(0) / sequences, own = rows.size(1);
  auto x = rows.view({sequences, t, own, rows.size(2)}).transpose(1, 2);
  return own == heads ? x : x.repeat_interleave(heads / own, 1);
}

at::Tensor window_mask(int64_t queries, int64_t keys, int64_t window,
                       const at::TensorOptions& options) {
  const auto q = at::arange(keys - queries, keys, options.dtype(at::kLong)).unsqueeze(1);
  const auto k = at::arange(keys, options.dtype(at::kLong)).unsqueeze(0);
  auto seen = k.le(q);
  if (window > 0) seen = seen.logical_and(k.gt(q - window));
  return seen;
}

// Sequences of one length: q [n * tq, H, d], k and v [n * tk, K, d].
at::Tensor equal_lengths(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         int64_t sequences, const AttentionShape& shape) {
  const int64_t heads = q.size(1), tq = q.size(0) / sequences, tk = k.size(0) / sequences;
  const auto query = heads_first(q, sequences, heads);
  const auto key = heads_first(k, sequences, heads), value = heads_first(v, sequences, heads);
  const bool windowed = shape.window > 0 && shape.window < tk;
  std::optional<at::Tensor> mask;
  const bool causal = tq == tk && tq > 1 && !windowed;
  if (!causal && (tq > 1 || windowed))
    mask = window_mask(tq, tk, windowed ? shape.window : 0, q.options());
  const auto out =
      at::scaled_dot_product_attention(query, key, value, mask, 0.0, causal, shape.scale);
  return out.transpose(1, 2).reshape({q.size(0), heads, q.size(2)});
}

bool all_equal(const std::vector<int64_t>& cu) {
  for (size_t i = 2; i < cu.size(); ++i)
    if (cu[i] - cu[i - 1] != cu[1] - cu[0]) return false;
  return true;
}

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
           const AttentionShape& shape) {
  if (q.dim() != 3 || k.dim() != 3 || k.sizes() != v.sizes() || q.size(2) != k.size(2))
    throw Error("attention", "q is [tokens, heads, d] and k, v [tokens, kv_heads, d]");
  if (k.size(1) < 1 || q.size(1) % k.size(1) != 0)
    throw Error("attention", fmt::format("{} heads are not a multiple of {} key/value heads",
                                         q.size(1), k.size(1)));
  if (shape.cu_q.size() != shape.cu_k.size() || shape.cu_q.size() < 2 ||
      shape.cu_q.back() != q.size(0) || shape.cu_k.back() != k.size(0))
    throw Error("attention",
                fmt::format("sequence bounds end at {} and {}, the tensors at {} and {}",
                            shape.cu_q.empty() ? 0 : shape.cu_q.back(),
                            shape.cu_k.empty() ? 0 : shape.cu_k.back(), q.size(0), k.size(0)));
}

}  // namespace

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const AttentionShape& shape) {
  check(q, k, v, shape);
  const auto sequences = static_cast<int64_t>(shape.cu_q.size()) - 1;
  if (all_equal(shape.cu_q) && all_equal(shape.cu_k))
    return equal_lengths(q, k, v, sequences, shape);
  std::vector<at::Tensor> parts;
  for (int64_t s = 0; s < sequences; ++s) {
    const auto q0 = shape.cu_q[s], k0 = shape.cu_k[s];
    const auto tq = shape.cu_q[s + 1] - q0, tk = shape.cu_k[s + 1] - k0;
    if (tq > 0)
      parts.push_back(
          equal_lengths(q.narrow(0, q0, tq), k.narrow(0, k0, tk), v.narrow(0, k0, tk), 1, shape));
  }
  return at::cat(parts);
}

at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const auto halves = x.chunk(2, -1);
  const auto c = cos.unsqueeze(1).to(x.scalar_type()), s = sin.unsqueeze(1).to(x.scalar_type());
  return at::cat({halves[0] * c - halves[1] * s, halves[1] * c + halves[0] * s}, -1);
}

}  // namespace budwood::ops
