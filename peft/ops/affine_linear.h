#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/quant/weight.h>
#include <optional>

namespace budwood::ops {

/// Whether a weight is group-affine: codes with scales and zero points [out, groups].
bool is_affine(const quant::Weight& weight);
/// The same codes with other scales, and, when they are defined, other zero points.
quant::Weight with_scales(const quant::Weight& weight, const at::Tensor& scales,
                          const at::Tensor& zeros = {});

/// y = x Wᵀ + b with W[o, j] = scales[o, g] (q[o, j] - zeros[o, g]), g the group of column j, q the
/// codes of a group-affine weight, whose own scales (and zero points, when `zeros` is undefined)
/// do not matter. x [..., in], scales and zeros fp32 [out, groups]; y [..., out] in the dtype of x.
/// Differentiable in x, scales, zeros and b; the gradient of W exists some rows at a time
/// (PEQA, arXiv 2305.14152).
at::Tensor affine_linear(const at::Tensor& x, const quant::Weight& weight,
                         const std::optional<at::Tensor>& bias, const at::Tensor& scales,
                         const at::Tensor& zeros = {});

}  // namespace budwood::ops
