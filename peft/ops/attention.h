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
  bool causal = true;  ///< false: every query sees every key of its sequence (no window then)
  int64_t prefix = 0;  ///< so many first keys of a sequence are seen by all its queries
};

/// Attention over sequences laid end to end, without padding. q [tokens_q, heads, d], k and v
/// [tokens_k, kv_heads, d] with heads a multiple of kv_heads; result [tokens_q, heads, d]. A query
/// that sees no key gets zeros. Differentiable; no matrix of scores is kept, and on the CPU none
/// is made. Also torch.ops.budwood.attention.
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const AttentionShape& shape);

}  // namespace budwood::ops
