#pragma once

#include <doctest/doctest.h>
#include <torch/torch.h>

#include <budwood/quant/calibrate/hessian.h>
#include <budwood/quant/error.h>
#include <budwood/quant/quantize.h>

namespace budwood::quant::calibrate::testing {

/// Inputs whose channels depend on each other and differ in size, as a model's do. [tokens, in]
inline at::Tensor inputs(int64_t tokens, int64_t in) {
  const auto mix = torch::randn({in, in}) * 0.5 / std::sqrt(static_cast<double>(in));
  const auto sizes = torch::exp(1.5 * torch::randn({in}));
  return torch::randn({tokens, in}).matmul(mix + 0.5 * torch::eye(in)) * sizes;
}

inline at::Tensor hessian(const at::Tensor& x) {
  HessianSum sum(x.size(1));
  sum.add(x);
  return sum.mean();
}

inline at::Tensor values(const Weight& w) {
  return w.rows(0, w.out, at::kFloat);
}

/// |x (a - b)ᵀ|², in float64.
inline double loss(const at::Tensor& x, const at::Tensor& a, const at::Tensor& b) {
  const auto delta = a.to(at::kDouble) - b.to(at::kDouble);
  return x.to(at::kDouble).matmul(delta.t()).square().sum().item<double>();
}

inline at::Tensor rtn(const at::Tensor& w, int64_t bits, int64_t group_size,
                      bool symmetric = false) {
  return values(quantize(w, {.format = bits == 4 ? "int4" : "affine8",
                             .block_size = group_size,
                             .symmetric = symmetric}));
}

}  // namespace budwood::quant::calibrate::testing
