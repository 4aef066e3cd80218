#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/quant/weight.h>
#include <optional>

namespace budwood::ops {

/// y = g ∘ (x Wᵀ + s (x Aᵀ) Bᵀ) + b in one operator (DoRA, arXiv 2402.09353, where g is the
/// magnitude over the norms of the rows of W + s B A, which are constants of the gradient).
/// x [..., in], A [r, in], B [out, r], g [out] in the dtype of A; y [..., out] in the dtype of x.
/// The gain multiplies W as it is read: there is no pass over y or its gradient for it.
/// Differentiable in x, A, B, g and b; keeps x, x Aᵀ and y - b. Also torch.ops.budwood.dora_linear.
at::Tensor dora_linear(const at::Tensor& x, const quant::Weight& weight,
                       const std::optional<at::Tensor>& bias, const at::Tensor& a,
                       const at::Tensor& b, const at::Tensor& gain, double scaling);

}  // namespace budwood::ops
