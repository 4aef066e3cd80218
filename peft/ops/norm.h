#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

/// Norms over the last dimension, computed in fp32 (fp64 for fp64) and returned in the dtype of x.
/// Differentiable in every tensor; x alone is kept for the backward. Also torch.ops.budwood.*.
namespace budwood::ops {

/// y = x / sqrt(mean(x²) + eps) ∘ weight (arXiv 1910.07467).
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

/// y = (x - mean) / sqrt(var + eps) ∘ weight + bias (arXiv 1607.06450).
at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                      double eps);

/// Their gradients from grad = dy: of x, and with `need_weight` of weight (and bias), else empty.
std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                     const at::Tensor& weight, double eps,
                                                     bool need_weight);
std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_backward(const at::Tensor& grad,
                                                                   const at::Tensor& x,
                                                                   const at::Tensor& weight,
                                                                   double eps, bool need_weight);

}  // namespace budwood::ops
