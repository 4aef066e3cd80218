#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/peft/kernels/rows.h>
#include <string_view>
#include <tuple>

/// Gated activations (arXiv 2002.05202). Differentiable; gate and up are kept for the backward.
namespace budwood::ops {

/// silu(gate) ∘ up.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);

/// gelu(gate) ∘ up; approximate is "none" or "tanh".
at::Tensor geglu(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);

at::Tensor gated(kernels::Gate kind, const at::Tensor& gate, const at::Tensor& up);
/// Gradients of gate and up.
std::tuple<at::Tensor, at::Tensor> gated_backward(kernels::Gate kind, const at::Tensor& grad,
                                                  const at::Tensor& gate, const at::Tensor& up);

}  // namespace budwood::ops
