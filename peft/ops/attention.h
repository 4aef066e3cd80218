#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace budwood::ops {

/// How the queries of one call see the keys.
struct AttentionShape {
  /// Sequence s has queries [cu_q[s], cu_q[s + 1]) and keys [cu_k[s], cu_k[s + 1]). Its last query
  /// is aligned with its last key; query i sees keys up to its own position.
  std::vector<int64_t> cu_q, cu_k;
  double scale = 1.0;
  int64_t window = 0;  ///< keys a query sees, itself included; 0 = all before it
};

/// Causal attention over sequences laid end to end, without padding and without a mask in memory
/// where none is needed. q [tokens_q, heads, d], k and v [tokens_k, kv_heads, d] with heads a
/// multiple of kv_heads; result [tokens_q, heads, d]. Differentiable.
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const AttentionShape& shape);

/// Rotates halves (i, i + d/2) of q or k [tokens, heads, d] by the angle tables [tokens, d/2].
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

}  // namespace budwood::ops
