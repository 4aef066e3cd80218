#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/peft/tensor_file.h>
#include <cstdint>
#include <vector>

namespace budwood::train {

struct AdamWOptions {
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0.0;  ///< of parameters with two or more dimensions; others never decay
  /// LoRA+ (arXiv 2402.12354): rate of B and of tensors with one dimension over that of A. With a
  /// ratio other than 1, factors of token tables learn at embedding_rate_ratio times A's rate.
  double lora_plus_ratio = 1.0;
  double embedding_rate_ratio = 1.0;
};

/// Adam with decoupled weight decay (arXiv 1711.05101), torch.optim.AdamW's arithmetic to the bit.
/// Its state is named tensors, so a run can be saved and go on exactly.
class AdamW {
 public:
  /// parameters: floating-point leaves by path, updated in place. Moments are fp32, or fp64 for
  /// fp64 parameters.
  AdamW(NamedTensors parameters, AdamWOptions options);

  /// One update with the parameters' gradients; those without one stay as they are.
  void step(double base_rate);
  /// Forgets all gradients.
  void zero_grad();
  const NamedTensors& parameters() const { return parameters_; }

  /// exp_avg.<path>, exp_avg_sq.<path> and step.<path> (int64 scalar). Views, not copies.
  NamedTensors state() const;
  /// Takes over what state() gave. Throws for a missing tensor or another shape or dtype; then
  /// nothing has changed. Tensors of other names are left alone.
  void restore(const NamedTensors& state);

 private:
  struct Moments {
    at::Tensor exp_avg, exp_avg_sq;
    int64_t step = 0;
    double rate = 1.0;  // of this tensor over the optimiser's
  };
  NamedTensors parameters_;
  AdamWOptions options_;
  std::vector<Moments> moments_;
};

/// Euclidean norm of all gradients together; with max_norm > 0 they are scaled so that it is not
/// exceeded (torch.nn.utils.clip_grad_norm_). Not finite when a gradient is not; then nothing is
/// scaled.
double clip_gradients(const NamedTensors& parameters, double max_norm);

}  // namespace budwood::train
