#pragma once

#include <ATen/core/Tensor.h>

/// Products with the factors of a low-rank term, without gradients: on the CPU with kernels where
/// the factor is fp32, elsewhere with ATen in the factor's dtype.
namespace budwood::ops {

/// t [tokens, n] times a factor m [n, r], which may be a transposed view.
at::Tensor times_factor(const at::Tensor& t, const at::Tensor& m);

/// scale * narrowᵀ wide: [tokens, r] and [tokens, n] -> [r, n], in the dtype of narrow.
at::Tensor factor_gradient(const at::Tensor& narrow, const at::Tensor& wide, double scale);

}  // namespace budwood::ops
