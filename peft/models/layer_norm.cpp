#include <ATen/ATen.h>

#include <budwood/peft/models/layer_norm.h>
#include <budwood/peft/ops/norm.h>

namespace budwood::models {

LayerNormImpl::LayerNormImpl(WeightSource& source, const std::string& path, int64_t size,
                             double eps)
    : eps_(eps) {
  weight = register_parameter("weight", source.vector(path + ".weight", size), false);
  bias = register_parameter("bias", source.vector(path + ".bias", size), false);
}

at::Tensor LayerNormImpl::forward(const at::Tensor& x) {
  return ops::layer_norm(x, weight, bias, eps_);
}

ops::Source LayerNormImpl::of(const at::Tensor& x) const {
  return ops::Source::layer_norm(x, weight, bias, eps_);
}

}  // namespace budwood::models
