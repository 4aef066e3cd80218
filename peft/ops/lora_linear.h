#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/quant/weight.h>
#include <optional>

namespace budwood::ops {

/// y = x Wᵀ + b + s (x Aᵀ) Bᵀ in one operator (LoRA, arXiv 2106.09685).
/// x [..., in], A [r, in], B [out, r]; y [..., out] in the dtype of x, the low-rank part computed
/// in the dtype of A. Differentiable in x, A, B and b; keeps x and x Aᵀ, never a product of
/// weights.
at::Tensor lora_linear(const at::Tensor& x, const quant::Weight& weight,
                       const std::optional<at::Tensor>& bias, const at::Tensor& a,
                       const at::Tensor& b, double scaling);

}  // namespace budwood::ops
