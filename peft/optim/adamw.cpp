#include <ATen/ATen.h>

#include <budwood/peft/optim/adamw.h>
#include <cmath>

namespace budwood::optim {
namespace {

const bool registered = register_rule(
    "adamw", [](const RuleOptions& options) { return std::make_unique<AdamWRule>(options); });

}  // namespace

TensorState AdamWRule::fresh(const at::Tensor& p) const {
  const auto type = p.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto zeros = at::zeros_like(p, p.options().dtype(type).requires_grad(false));
  TensorState state = {{"exp_avg", zeros},
                       {"exp_avg_sq", zeros.clone()},
                       {"step", at::scalar_tensor(int64_t{0}, at::kLong)}};
  if (p.scalar_type() != type) state["master"] = p.detach().to(type);
  return state;
}

// The order of operations is torch's single-tensor AdamW, on which bit equality rests.
void AdamWRule::update(at::Tensor tensor, at::Tensor grad, TensorState& state, double rate) const {
  const auto master = state.find("master");
  auto p = master == state.end() ? tensor : master->second;
  auto &mean = state.at("exp_avg"), &square = state.at("exp_avg_sq");
  grad = grad.to(mean.scalar_type());
  const auto count = static_cast<double>(count_step(state));
  if (p.dim() >= 2 || options_.decay_vectors) p.mul_(1.0 - rate * options_.weight_decay);
  mean.lerp_(grad, 1.0 - options_.beta1);
  square.mul_(options_.beta2).addcmul_(grad, grad, 1.0 - options_.beta2);
  const double correction1 = 1.0 - std::pow(options_.beta1, count);
  const double correction2 = std::sqrt(1.0 - std::pow(options_.beta2, count));
  const auto denominator = (square.sqrt() / correction2).add_(options_.eps);
  p.addcdiv_(mean, denominator, -(rate / correction1));
  if (master != state.end()) tensor.copy_(p);
}

}  // namespace budwood::optim
