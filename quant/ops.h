#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/quant/weight.h>
#include <optional>

/// Differentiable operators on frozen weights, registered once as torch.ops.budwood.* and called by
/// the C++ slots and the Python slots alike. A weight travels as (Tensor[] parts, int format,
/// SymInt[] shape). All work under autograd, autocast, torch.compile and on meta tensors.
namespace budwood::quant {

/// y = x Wᵀ + b: [..., in] -> [..., out] in the dtype of x. Differentiable in x, in b and, for
/// dense forms whose part requires grad, in W.
at::Tensor linear(const at::Tensor& x, const Weight& weight,
                  const std::optional<at::Tensor>& bias = {});

/// Keeps the library with the operators linked when a program calls nothing else of it.
void link_operators();

}  // namespace budwood::quant
