#pragma once

#include <torch/optim/adamw.h>

#include <budwood/peft/optim/lora_fa.h>
#include <budwood/peft/optim/update_rule.h>
#include <budwood/peft/tensor_file.h>
#include <functional>
#include <memory>
#include <string>
#include <vector>

/// Budwood's rules as LibTorch optimisers: parameter groups, schedulers, torch::save and
/// torch::load as with its own.
namespace budwood::optim {

/// Options of a group.
struct TorchRuleOptions : public torch::optim::OptimizerCloneableOptions<TorchRuleOptions> {
  explicit TorchRuleOptions(double rate = 1e-3, RuleOptions options = {})
      : learning_rate(rate), rule(options) {
    rule.decay_vectors = true;  // as LibTorch's: what is not to decay is a group of its own
  }
  double get_lr() const override { return learning_rate; }
  void set_lr(const double rate) override { learning_rate = rate; }

  double learning_rate;
  RuleOptions rule;
};

/// Updates tensors by a rule, "adamw8bit" for one. Groups with options of their own are given as
/// TorchRuleOptions.
class RuleOptimizer : public torch::optim::Optimizer {
 public:
  RuleOptimizer(std::string rule, const std::vector<torch::optim::OptimizerParamGroup>& groups,
                TorchRuleOptions defaults);
  RuleOptimizer(std::string rule, std::vector<at::Tensor> parameters, TorchRuleOptions defaults);

  at::Tensor step(LossClosure closure = nullptr) override;
  /// What the rule remembers, by the place of the parameter among all.
  void save(torch::serialize::OutputArchive& archive) const override;
  /// Throws Error when it does not fit the parameters; then nothing has changed.
  void load(torch::serialize::InputArchive& archive) override;

 private:
  std::string rule_;
  std::vector<TensorState> states_;
};

/// AdamW with moments of a byte each (arXiv 2110.02861).
class AdamW8bit final : public RuleOptimizer {
 public:
  explicit AdamW8bit(std::vector<at::Tensor> parameters,
                     TorchRuleOptions defaults = TorchRuleOptions())
      : RuleOptimizer("adamw8bit", std::move(parameters), defaults) {}
  AdamW8bit(const std::vector<torch::optim::OptimizerParamGroup>& groups, TorchRuleOptions defaults)
      : RuleOptimizer("adamw8bit", groups, defaults) {}
};

/// LibTorch's AdamW with the gradients of LoRA-FA (lora_fa.h) over all that a model trains then.
class LoraFaAdamW final : public torch::optim::AdamW {
 public:
  explicit LoraFaAdamW(torch::nn::Module& model, torch::optim::AdamWOptions defaults = {})
      : LoraFaAdamW(LoraFa(model), model, std::move(defaults)) {}
  at::Tensor step(LossClosure closure = nullptr) override;

 private:
  LoraFaAdamW(LoraFa lora_fa, torch::nn::Module& model, torch::optim::AdamWOptions defaults);
  LoraFa lora_fa_;
};

/// Parameter groups of LoRA+ (arXiv 2402.12354) for any LibTorch optimiser: A at `rate`, B and
/// vectors at `ratio` times that, factors of token tables at `embedding_rate`. `options` makes the
/// options of a group from its learning rate.
std::vector<torch::optim::OptimizerParamGroup> lora_plus_groups(
    const NamedTensors& parameters, double rate, double ratio, double embedding_rate,
    const std::function<std::unique_ptr<torch::optim::OptimizerOptions>(double rate)>& options);

}  // namespace budwood::optim
