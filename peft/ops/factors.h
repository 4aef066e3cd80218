#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

/// Products with the factors of a low-rank term, without gradients: on the CPU with kernels where
/// the factor is fp32, elsewhere with ATen in the factor's dtype.
namespace budwood::ops {

/// t [..., n] as rows [tokens, n].
at::Tensor flat(const at::Tensor& t);

/// Throws, in the operator's name, unless x is [..., in], A [r, in] and B [out, r] in A's dtype.
void check_factors(std::string_view name, const at::Tensor& x, at::IntArrayRef shape,
                   const at::Tensor& a, const at::Tensor& b);

/// Tensors without values of what a forward gives: y [..., out] like x, and u = x Aᵀ [tokens, r].
std::tuple<at::Tensor, at::Tensor> like_results(const at::Tensor& x, c10::SymIntArrayRef shape,
                                                const at::Tensor& a);

/// t [tokens, n] times a factor m [n, r], which may be a transposed view.
at::Tensor times_factor(const at::Tensor& t, const at::Tensor& m);

/// scale * narrowᵀ wide: [tokens, r] and [tokens, n] -> [r, n], in the dtype of narrow.
at::Tensor factor_gradient(const at::Tensor& narrow, const at::Tensor& wide, double scale);

}  // namespace budwood::ops
