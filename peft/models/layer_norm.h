#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <budwood/peft/models/weight_source.h>
#include <budwood/peft/ops/projections.h>

namespace budwood::models {

/// A frozen layer norm: weight and bias [size].
class LayerNormImpl : public torch::nn::Module {
 public:
  LayerNormImpl(WeightSource& source, const std::string& path, int64_t size, double eps);
  at::Tensor forward(const at::Tensor& x);
  /// The norm of x as what projections read: x is kept, the norm computed again.
  ops::Source of(const at::Tensor& x) const;

  at::Tensor weight, bias;

 private:
  double eps_;
};
TORCH_MODULE(LayerNorm);

}  // namespace budwood::models
