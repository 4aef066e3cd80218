#pragma once

#include <ATen/core/Tensor.h>

namespace budwood::ops {

/// y = x / rms(x) ∘ weight over the last dimension (arXiv 1910.07467), computed in fp32 or wider
/// and returned in the dtype of x. Differentiable.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

/// silu(gate) ∘ up.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);

}  // namespace budwood::ops
