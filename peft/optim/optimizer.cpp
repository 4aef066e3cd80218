#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <budwood/peft/optim/optimizer.h>
#include <budwood/quant/error.h>
#include <cmath>
#include <unordered_map>

namespace budwood::optim {
namespace {

std::string described(const at::Tensor& t) {
  return fmt::format("{} {}", dtype_text(t.scalar_type()), io::shape_text(t.sizes().vec()));
}

}  // namespace

Optimizer::Optimizer(NamedTensors parameters, std::shared_ptr<const UpdateRule> rule,
                     std::vector<double> rates)
    : parameters_(std::move(parameters)),
      rule_(std::move(rule)),
      rates_(std::move(rates)),
      states_(parameters_.size()) {
  if (parameters_.empty()) throw Error("Optimizer", "there are no parameters to train");
  if (rates_.empty()) rates_.assign(parameters_.size(), 1.0);
  if (rates_.size() != parameters_.size())
    throw Error("Optimizer",
                fmt::format("{} rates for {} parameters", rates_.size(), parameters_.size()));
  for (const auto& [path, p] : parameters_)
    if (!p.is_floating_point() || !p.is_leaf())
      throw Error("Optimizer", fmt::format("{} is not a floating-point leaf", path));
}

const UpdateRule& Optimizer::rule(size_t index) const {
  return rule_->rule_for(parameters_[index].first, parameters_[index].second);
}

void Optimizer::step(double base_rate) {
  for (size_t i = 0; i < parameters_.size(); ++i)
    if (const auto& grad = parameters_[i].second.grad(); grad.defined()) update(i, grad, base_rate);
}

void Optimizer::update(size_t index, const at::Tensor& grad, double base_rate) {
  const at::NoGradGuard no_grad;
  const auto& own = rule(index);
  auto& [path, p] = parameters_[index];
  if (states_[index].empty()) states_[index] = own.fresh(p);
  own.update(p, grad, states_[index], base_rate * rates_[index]);
}

void Optimizer::zero_grad() {
  for (auto& [path, p] : parameters_) p.mutable_grad() = at::Tensor();
}

void Optimizer::forget(size_t index) {
  states_[index].clear();
}

NamedTensors Optimizer::state() const {
  NamedTensors all;
  for (size_t i = 0; i < parameters_.size(); ++i)
    for (const auto& [name, tensor] : states_[i])
      all.emplace_back(name + "." + parameters_[i].first, tensor);
  return all;
}

void Optimizer::restore(const NamedTensors& state) {
  const std::unordered_map<std::string, at::Tensor> index(state.begin(), state.end());
  std::vector<TensorState> restored(parameters_.size());
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const auto& [path, p] = parameters_[i];
    for (const auto& [name, own] : rule(i).fresh(p)) {
      const auto it = index.find(name + "." + path);
      if (it == index.end()) continue;
      const auto& found = it->second;
      if (found.sizes() != own.sizes() || found.scalar_type() != own.scalar_type())
        throw Error("Optimizer::restore", fmt::format("'{}.{}' is {}, wanted {}", name, path,
                                                      described(found), described(own)));
      if (name == "step" && found.item<int64_t>() < 0)
        throw Error("Optimizer::restore",
                    fmt::format("'step.{}' is {}", path, found.item<int64_t>()));
      restored[i][name] = found.to(own.device(), /*non_blocking=*/false, /*copy=*/true);
    }
    if (restored[i].empty()) continue;
    for (const auto& [name, own] : rule(i).fresh(p))
      if (!restored[i].contains(name))
        throw Error("Optimizer::restore",
                    fmt::format("the state has no tensor '{}.{}'", name, path));
  }
  states_ = std::move(restored);
}

int64_t Optimizer::state_bytes() const {
  int64_t bytes = 0;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    // Shapes alone: the tensors themselves are made when they are needed.
    const auto& p = parameters_[i].second;
    const auto shape = at::empty(p.sizes(), p.options().device(at::kMeta));
    for (const auto& [name, tensor] : rule(i).fresh(shape)) bytes += tensor.nbytes();
  }
  return bytes;
}

std::vector<double> lora_plus_rates(const NamedTensors& parameters, double ratio,
                                    double embedding_ratio) {
  std::vector<double> rates(parameters.size(), 1.0);
  if (ratio == 1.0) return rates;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto& [path, p] = parameters[i];
    const bool fast = p.dim() == 1 || path.find("lora_B") != std::string::npos;
    if (path.find("lora_embedding_") != std::string::npos)
      rates[i] = embedding_ratio;
    else if (fast)
      rates[i] = ratio;
  }
  return rates;
}

double clip_gradients(const NamedTensors& parameters, double max_norm) {
  at::NoGradGuard no_grad;
  std::vector<at::Tensor> norms;
  for (const auto& [path, p] : parameters)
    if (p.grad().defined()) norms.push_back(p.grad().norm().to(at::kFloat));
  if (norms.empty()) return 0.0;
  const auto norm = at::stack(norms).norm();
  const auto value = norm.item<double>();
  if (max_norm > 0 && std::isfinite(value)) {
    const auto scale = at::clamp_max(max_norm / (norm + 1e-6), 1.0);
    for (const auto& [path, p] : parameters)
      if (p.grad().defined()) p.grad().mul_(scale.to(p.grad().scalar_type()));
  }
  return value;
}

}  // namespace budwood::optim
