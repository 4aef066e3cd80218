#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

/// AWQ (arXiv 2306.00978): round-to-nearest after a change of the weight that the inputs suggest.
/// Channels with large inputs are scaled up (and the inputs down, by whoever makes them), then the
/// range of each group is narrowed where that makes the output better.
namespace budwood::quant::calibrate {

struct AwqOptions {
  int64_t bits = 4;
  int64_t group_size = 64;
  bool symmetric = false;
  int64_t ratios = 20;      ///< exponents 0, 1 / ratios, ... below 1
  int64_t clip_steps = 10;  ///< how often a range is narrowed
  double least_clip = 0.5;  ///< the narrowest, as a part of the whole range
};

struct AwqScale {
  at::Tensor scale;      ///< fp32 [in]: weights are W diag(scale), inputs diag(1 / scale) x
  double ratio = 0;      ///< the exponent it came from; 0 = no scaling
  double error = 0;      ///< of the output with it
  double rtn_error = 0;  ///< of the output with ratio 0, plain rounding
};

/// Of scales mean_abs ^ ratio the one whose rounded weights disturb the output least.
/// weights: all projections [out, in] that read the same input; mean_abs [in]: mean |x| of it;
/// error(rounded) -> the output's error with these matrices, fp32, in place of the weights.
AwqScale awq_scale(const std::vector<at::Tensor>& weights, const at::Tensor& mean_abs,
                   const std::function<double(const std::vector<at::Tensor>&)>& error,
                   const AwqOptions& options = {});

/// W [out, in] fp32, each group's values cut off where that makes the error of the rounded group's
/// output least; never a larger one than without. hessian [in, in]: mean of x xᵀ.
at::Tensor awq_clip(const at::Tensor& w, const at::Tensor& hessian, const AwqOptions& options = {});

}  // namespace budwood::quant::calibrate
