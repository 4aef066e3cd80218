#pragma once

#include <budwood/peft/optim/update_rule.h>

namespace budwood::optim {

/// Adam with decoupled weight decay (arXiv 1711.05101), torch.optim.AdamW's arithmetic to the bit.
/// Remembers "exp_avg" and "exp_avg_sq" in fp32 (fp64 for fp64 tensors), and "step"; of shorter
/// tensors also what they would be in fp32, "master", which is rounded after each update.
class AdamWRule final : public UpdateRule {
 public:
  explicit AdamWRule(const RuleOptions& options) : options_(options) {}
  TensorState fresh(const at::Tensor& p) const override;
  void update(at::Tensor p, at::Tensor grad, TensorState& state, double rate) const override;

 private:
  RuleOptions options_;
};

}  // namespace budwood::optim
