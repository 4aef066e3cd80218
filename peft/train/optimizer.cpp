#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <budwood/peft/train/optimizer.h>
#include <budwood/quant/error.h>
#include <cmath>
#include <unordered_map>

namespace budwood::train {
namespace {

using Index = std::unordered_map<std::string, at::Tensor>;

const at::Tensor& find(const Index& index, const std::string& name, at::IntArrayRef shape,
                       at::ScalarType dtype) {
  const auto it = index.find(name);
  if (it == index.end())
    throw Error("AdamW::restore", fmt::format("the state has no tensor '{}'", name));
  const auto& t = it->second;
  if (t.sizes() != shape || t.scalar_type() != dtype)
    throw Error("AdamW::restore",
                fmt::format("'{}' is {} {}, wanted {} {}", name, dtype_text(t.scalar_type()),
                            io::shape_text({t.sizes().data(), t.sizes().size()}), dtype_text(dtype),
                            io::shape_text({shape.data(), shape.size()})));
  return t;
}

double rate_of(const std::string& path, const at::Tensor& p, const AdamWOptions& options) {
  if (options.lora_plus_ratio == 1.0) return 1.0;
  if (path.find("lora_embedding_") != std::string::npos) return options.embedding_rate_ratio;
  const bool fast = p.dim() == 1 || path.find("lora_B") != std::string::npos;
  return fast ? options.lora_plus_ratio : 1.0;
}

}  // namespace

AdamW::AdamW(NamedTensors parameters, AdamWOptions options)
    : parameters_(std::move(parameters)), options_(options) {
  if (parameters_.empty()) throw Error("AdamW", "there are no parameters to train");
  for (const auto& [path, p] : parameters_) {
    if (!p.is_floating_point() || !p.is_leaf())
      throw Error("AdamW", fmt::format("{} is not a floating-point leaf", path));
    const auto type = p.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const auto zeros = at::zeros_like(p, p.options().dtype(type).requires_grad(false));
    moments_.push_back({zeros, zeros.clone(), 0, rate_of(path, p, options_)});
  }
}

// The order of operations is torch's single-tensor AdamW, on which bit equality rests.
void AdamW::step(double base_rate) {
  at::NoGradGuard no_grad;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    auto p = parameters_[i].second;
    if (!p.grad().defined()) continue;
    auto& m = moments_[i];
    const double learning_rate = base_rate * m.rate;
    const auto grad = p.grad().to(m.exp_avg.scalar_type());
    ++m.step;
    if (p.dim() >= 2) p.mul_(1.0 - learning_rate * options_.weight_decay);
    m.exp_avg.lerp_(grad, 1.0 - options_.beta1);
    m.exp_avg_sq.mul_(options_.beta2).addcmul_(grad, grad, 1.0 - options_.beta2);
    const auto count = static_cast<double>(m.step);
    const double correction1 = 1.0 - std::pow(options_.beta1, count);
    const double correction2 = std::sqrt(1.0 - std::pow(options_.beta2, count));
    const auto denominator = (m.exp_avg_sq.sqrt() / correction2).add_(options_.eps);
    p.addcdiv_(m.exp_avg, denominator, -(learning_rate / correction1));
  }
}

void AdamW::zero_grad() {
  for (auto& [path, p] : parameters_) p.mutable_grad() = at::Tensor();
}

NamedTensors AdamW::state() const {
  NamedTensors state;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const auto& path = parameters_[i].first;
    state.emplace_back("exp_avg." + path, moments_[i].exp_avg);
    state.emplace_back("exp_avg_sq." + path, moments_[i].exp_avg_sq);
    state.emplace_back("step." + path, at::scalar_tensor(moments_[i].step, at::kLong));
  }
  return state;
}

void AdamW::restore(const NamedTensors& state) {
  const Index index(state.begin(), state.end());
  std::vector<Moments> restored;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const auto& path = parameters_[i].first;
    const auto& own = moments_[i].exp_avg;
    const auto moment = [&](const char* kind) {
      return find(index, kind + path, own.sizes(), own.scalar_type()).to(own.device(), false, true);
    };
    const auto step = find(index, "step." + path, {}, at::kLong).item<int64_t>();
    if (step < 0) throw Error("AdamW::restore", fmt::format("'step.{}' is {}", path, step));
    restored.push_back({moment("exp_avg."), moment("exp_avg_sq."), step});
  }
  moments_ = std::move(restored);
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

}  // namespace budwood::train
