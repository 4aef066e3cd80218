#include <fmt/format.h>
#include <torch/serialize/archive.h>

#include <budwood/peft/inject.h>
#include <budwood/peft/optim/optimizer.h>
#include <budwood/peft/optim/torch_optimizers.h>
#include <budwood/quant/error.h>
#include <map>

namespace budwood::optim {
namespace {

std::vector<torch::optim::OptimizerParamGroup> one_group(std::vector<at::Tensor> parameters) {
  return {torch::optim::OptimizerParamGroup(std::move(parameters))};
}

std::string key_of(size_t index, const std::string& name) {
  return fmt::format("{}.{}", index, name);
}

}  // namespace

RuleOptimizer::RuleOptimizer(std::string rule, std::vector<at::Tensor> parameters,
                             TorchRuleOptions defaults)
    : RuleOptimizer(std::move(rule), one_group(std::move(parameters)), std::move(defaults)) {}

RuleOptimizer::RuleOptimizer(std::string rule,
                             const std::vector<torch::optim::OptimizerParamGroup>& groups,
                             TorchRuleOptions defaults)
    : Optimizer(groups, std::make_unique<TorchRuleOptions>(std::move(defaults))),
      rule_(std::move(rule)) {
  for (const auto& group : param_groups())
    make_rule(rule_, static_cast<const TorchRuleOptions&>(group.options()).rule);
}

at::Tensor RuleOptimizer::step(LossClosure closure) {
  at::Tensor loss;
  if (closure) {
    const at::AutoGradMode grad(true);
    loss = closure();
  }
  const at::NoGradGuard no_grad;
  size_t index = 0;
  for (auto& group : param_groups()) {
    const auto& options = static_cast<const TorchRuleOptions&>(group.options());
    const auto rule = make_rule(rule_, options.rule);
    for (auto& p : group.params()) {
      if (states_.size() <= index) states_.resize(index + 1);
      auto& state = states_[index++];
      if (!p.grad().defined()) continue;
      const auto& own = rule->rule_for("", p);
      if (state.empty()) state = own.fresh(p);
      own.update(p, p.grad(), state, options.learning_rate);
    }
  }
  return loss;
}

void RuleOptimizer::save(torch::serialize::OutputArchive& archive) const {
  for (size_t i = 0; i < states_.size(); ++i)
    for (const auto& [name, tensor] : states_[i]) archive.write(key_of(i, name), tensor);
}

void RuleOptimizer::load(torch::serialize::InputArchive& archive) {
  std::vector<TensorState> restored;
  for (const auto& group : param_groups()) {
    const auto rule = make_rule(rule_, static_cast<const TorchRuleOptions&>(group.options()).rule);
    for (const auto& p : group.params()) {
      const size_t i = restored.size();
      auto& state = restored.emplace_back();
      for (const auto& [name, own] : rule->rule_for("", p).fresh(p)) {
        at::Tensor found;
        if (!archive.try_read(key_of(i, name), found)) {
          if (!state.empty())
            throw Error("RuleOptimizer::load",
                        fmt::format("the state has no '{}'", key_of(i, name)));
          break;
        }
        if (found.sizes() != own.sizes() || found.scalar_type() != own.scalar_type())
          throw Error(
              "RuleOptimizer::load",
              fmt::format("'{}' is {} {}, wanted {} {}", key_of(i, name),
                          dtype_text(found.scalar_type()), io::shape_text(found.sizes().vec()),
                          dtype_text(own.scalar_type()), io::shape_text(own.sizes().vec())));
        state[name] = found;
      }
    }
  }
  states_ = std::move(restored);
}

namespace {

std::vector<at::Tensor> trained(torch::nn::Module& model) {
  std::vector<at::Tensor> tensors;
  for (const auto& [path, p] : trainable_parameters(model)) tensors.push_back(p);
  return tensors;
}

}  // namespace

LoraFaAdamW::LoraFaAdamW(LoraFa lora_fa, torch::nn::Module& model,
                         torch::optim::AdamWOptions defaults)
    : AdamW(trained(model), std::move(defaults)), lora_fa_(std::move(lora_fa)) {}

at::Tensor LoraFaAdamW::step(LossClosure closure) {
  at::Tensor loss;
  if (closure) {
    const at::AutoGradMode grad(true);
    loss = closure();
  }
  lora_fa_.correct_gradients();
  AdamW::step();
  return loss;
}

std::vector<torch::optim::OptimizerParamGroup> lora_plus_groups(
    const NamedTensors& parameters, double rate, double ratio, double embedding_rate,
    const std::function<std::unique_ptr<torch::optim::OptimizerOptions>(double rate)>& options) {
  const auto rates = lora_plus_rates(parameters, ratio, embedding_rate / rate);
  std::map<double, std::vector<at::Tensor>> by_rate;
  for (size_t i = 0; i < parameters.size(); ++i) by_rate[rates[i]].push_back(parameters[i].second);
  std::vector<torch::optim::OptimizerParamGroup> groups;
  for (auto& [factor, tensors] : by_rate)
    groups.emplace_back(std::move(tensors), options(rate * factor));
  return groups;
}

}  // namespace budwood::optim
