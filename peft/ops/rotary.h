#pragma once

#include <ATen/core/Tensor.h>

namespace budwood::ops {

/// Rotary embedding (arXiv 2104.09864): turns the pairs (i, i + n/2), i < n/2, of each head of x
/// [tokens, heads, d] by the angles of its token, cos and sin [tokens, n/2], n <= d; elements from
/// n on stay. Differentiable in x, keeps only the angles. Also torch.ops.budwood.rotary.
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

}  // namespace budwood::ops
