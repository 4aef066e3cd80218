#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <string>
#include <vector>

namespace budwood {

/// LoRA factors for one layer of a model without slots: W' = W + scaling B A, both flattened behind
/// their first dimension. A [r, in, ...], B [out, r, ...] for a Linear or a convolution without
/// groups; A [r, dim] and B [vocabulary, r] for an Embedding.
struct WeightDelta {
  std::string path;  ///< of the layer in the model, as named_modules() gives it
  at::Tensor a, b;   ///< leaves of the caller's optimiser; gradients flow to them
  double scaling = 1.0;
};

/// Trains or runs factors on a torch::nn model that knows nothing of Budwood: while it lives, the
/// `weight` members of the layers are W', computed once, with gradients to the factors, and the
/// registered parameters stay W. Works for torch::nn::Linear, Conv1d, Conv2d, Conv3d and Embedding.
///
///     torch::nn::Sequential model(torch::nn::Conv2d(3, 8, 3), ...);
///     ScopedWeightDelta adapted(*model, {{"0", a, b, alpha / r}});
///     loss(model->forward(x)).backward();
///
/// A matrix of W's size is held for each layer, and dropout on the factors' input is not possible:
/// models that are written over slots (slot.h) have neither limit. Throws Error, with nothing
/// changed, for a path that names no such layer and for factors that do not make its weight.
class ScopedWeightDelta {
 public:
  ScopedWeightDelta(torch::nn::Module& model, const std::vector<WeightDelta>& deltas);
  /// The layers have their own weights again, the same tensors as before.
  ~ScopedWeightDelta();
  ScopedWeightDelta(const ScopedWeightDelta&) = delete;
  ScopedWeightDelta& operator=(const ScopedWeightDelta&) = delete;

 private:
  struct Held {
    std::shared_ptr<torch::nn::Module> layer;
    at::Tensor* member;  // of the layer
    at::Tensor weight;   // what it was
  };
  std::vector<Held> held_;
};

}  // namespace budwood
