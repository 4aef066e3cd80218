#pragma once

#include <budwood/peft/optim/update_rule.h>
#include <budwood/peft/tensor_file.h>
#include <cstdint>
#include <memory>
#include <vector>

namespace budwood::optim {

/// Tensors, the rule they change by, and what it remembers of each. The state is named tensors, so
/// a run can be saved and go on exactly; it is made when a tensor is first updated.
class Optimizer {
 public:
  /// parameters: floating-point leaves by path, updated in place. `rates`: each one's learning rate
  /// over the common one; empty = 1.
  Optimizer(NamedTensors parameters, std::shared_ptr<const UpdateRule> rule,
            std::vector<double> rates = {});

  /// One update with the parameters' gradients; those without one stay as they are.
  void step(double base_rate);
  /// One update of parameter `index` with a gradient, which may be overwritten.
  void update(size_t index, const at::Tensor& grad, double base_rate);
  /// Forgets all gradients.
  void zero_grad();
  /// Forgets what is remembered of a parameter: its next update is a first one.
  void forget(size_t index);
  const NamedTensors& parameters() const { return parameters_; }

  /// <name>.<path> for each name that the rule knows. Views, not copies.
  NamedTensors state() const;
  /// Takes over what state() gave; a parameter of which nothing is there begins afresh. Throws for
  /// one whose tensors are there in part, or of another shape or dtype; then nothing has changed.
  /// Tensors of other names are left alone.
  void restore(const NamedTensors& state);
  /// Bytes that state() has, or will have.
  int64_t state_bytes() const;

 private:
  const UpdateRule& rule(size_t index) const;
  NamedTensors parameters_;
  std::shared_ptr<const UpdateRule> rule_;
  std::vector<double> rates_;
  std::vector<TensorState> states_;
};

/// LoRA+ (arXiv 2402.12354): each parameter's learning rate over that of A. B and tensors with one
/// dimension have `ratio`, factors of token tables `embedding_ratio`; with ratio 1 all have 1.
std::vector<double> lora_plus_rates(const NamedTensors& parameters, double ratio,
                                    double embedding_ratio = 1.0);

/// Euclidean norm of all gradients together; with max_norm > 0 they are scaled so that it is not
/// exceeded (torch.nn.utils.clip_grad_norm_). Not finite when a gradient is not; then nothing is
/// scaled.
double clip_gradients(const NamedTensors& parameters, double max_norm);

}  // namespace budwood::optim
