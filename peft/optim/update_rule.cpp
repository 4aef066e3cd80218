#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/peft/optim/update_rule.h>
#include <budwood/quant/error.h>
#include <cmath>

namespace budwood::optim {
namespace {

std::map<std::string, RuleFactory>& rules() {
  static std::map<std::string, RuleFactory> all;
  return all;
}

void require(bool holds, const char* field, double value, const char* wanted) {
  if (!holds) throw Error("RuleOptions", fmt::format("{} is {}, wanted {}", field, value, wanted));
}

}  // namespace

void RuleOptions::validate() const {
  require(beta1 >= 0 && beta1 < 1, "beta1", beta1, "at least 0 and below 1");
  require(beta2 >= 0 && beta2 < 1, "beta2", beta2, "at least 0 and below 1");
  require(eps > 0 && std::isfinite(eps), "eps", eps, "more than 0");
  require(weight_decay >= 0 && std::isfinite(weight_decay), "weight_decay", weight_decay,
          "at least 0");
  require(block_size >= 16 && block_size <= 4096, "block_size", static_cast<double>(block_size),
          "16 to 4096");
  require(min_8bit_size >= 0, "min_8bit_size", static_cast<double>(min_8bit_size), "at least 0");
  require(rank >= 1, "rank", static_cast<double>(rank), "at least 1");
  require(refresh_every >= 1, "refresh_every", static_cast<double>(refresh_every), "at least 1");
  require(scale > 0 && std::isfinite(scale), "scale", scale, "more than 0");
  require(clip_threshold > 0, "clip_threshold", clip_threshold, "more than 0");
  require(least_scale >= 0, "least_scale", least_scale, "at least 0");
}

bool register_rule(const std::string& name, RuleFactory factory) {
  return rules().emplace(name, std::move(factory)).second;
}

std::shared_ptr<const UpdateRule> make_rule(const std::string& name, const RuleOptions& options) {
  const auto it = rules().find(name);
  if (it == rules().end())
    throw Error("make_rule", fmt::format("there is no rule '{}'; there are {}", name,
                                         fmt::join(rule_names(), ", ")));
  options.validate();
  return it->second(options);
}

std::vector<std::string> rule_names() {
  std::vector<std::string> names;
  for (const auto& [name, factory] : rules()) names.push_back(name);
  return names;
}

int64_t count_step(TensorState& state) {
  auto& step = state.at("step");
  const auto number = step.item<int64_t>() + 1;
  step = at::scalar_tensor(number, at::kLong);
  return number;
}

void decay(at::Tensor& p, double rate, const RuleOptions& options) {
  if (options.weight_decay > 0 && (p.dim() >= 2 || options.decay_vectors))
    p.mul_(1.0 - rate * options.weight_decay);
}

void add_change(at::Tensor& p, const at::Tensor& change, double scale) {
  if (p.scalar_type() == at::kFloat || p.scalar_type() == at::kDouble)
    p.add_(change, scale);
  else
    p.copy_(p.to(at::kFloat).add_(change, scale));
}

}  // namespace budwood::optim
