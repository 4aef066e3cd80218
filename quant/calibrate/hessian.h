#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace budwood::quant::calibrate {

/// What a calibrator knows of a projection's inputs: the mean of x xᵀ and of |x|, over tokens.
class HessianSum {
 public:
  explicit HessianSum(int64_t in);

  /// x [..., in], floating point. Throws Error for values that are not finite.
  void add(const at::Tensor& x);

  int64_t tokens() const { return tokens_; }
  /// Mean of x xᵀ [in, in], fp32; the Hessian of the squared output error, but for a factor 2.
  const at::Tensor& mean() const { return mean_; }
  /// Mean of |x| [in], fp32.
  const at::Tensor& mean_abs() const { return mean_abs_; }

 private:
  int64_t tokens_ = 0;
  at::Tensor mean_, mean_abs_;
};

/// Mean over tokens of |delta x|², delta [out, in], by the mean of x xᵀ.
double output_error(const at::Tensor& delta, const at::Tensor& hessian);

}  // namespace budwood::quant::calibrate
