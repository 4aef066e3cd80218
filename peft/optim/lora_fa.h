#pragma once

#include <torch/nn/module.h>

#include <utility>
#include <vector>

namespace budwood::optim {

/// LoRA-FA (arXiv 2308.03303): A stays at its random start and only B is trained. B's gradient G
/// becomes G (A Aᵀ + 1e-8 I)⁻¹ / s², the step of B whose effect on the weight is nearest to that of
/// full fine-tuning. The adapter and its file are LoRA's.
class LoraFa {
 public:
  /// Takes A of every trained LoRA adapter of a projection out of training. Throws Error when there
  /// is none.
  explicit LoraFa(torch::nn::Module& model);
  /// Call it between the backward and the optimiser's step.
  void correct_gradients() const;

 private:
  std::vector<std::pair<at::Tensor, at::Tensor>> inverses_;  // B, (A Aᵀ + 1e-8 I)⁻¹ / s²
};

}  // namespace budwood::optim
