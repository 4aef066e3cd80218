#include <ATen/ATen.h>

#include <budwood/peft/optim/update_rule.h>
#include <algorithm>
#include <cmath>

namespace budwood::optim {
namespace {

double root_mean_square(const at::Tensor& t) {
  return std::sqrt(t.square().mean().item<double>());
}

/// AdaLomo (arXiv 2310.10195): gradient descent with the second moment of a matrix as the product
/// of the means of its rows and its columns, "row" [rows] and "column" [cols]; vectors keep all of
/// it, "square". Tensors of more dimensions are matrices of their first one.
class AdaLomoRule final : public UpdateRule {
 public:
  explicit AdaLomoRule(const RuleOptions& options) : options_(options) {}

  TensorState fresh(const at::Tensor& p) const override {
    const auto options = p.options().dtype(at::kFloat).requires_grad(false);
    const auto step = at::scalar_tensor(int64_t{0}, at::kLong);
    if (p.dim() < 2) return {{"square", at::zeros(p.sizes(), options)}, {"step", step}};
    const int64_t rows = p.size(0), cols = p.numel() / std::max<int64_t>(1, rows);
    return {{"row", at::zeros({rows}, options)},
            {"column", at::zeros({cols}, options)},
            {"step", step}};
  }

  void update(at::Tensor p, at::Tensor grad, TensorState& state, double rate) const override {
    const double keep = 1.0 - std::pow(static_cast<double>(count_step(state)), -0.8);
    // In fp32, in place of the gradient: the largest tensor of an update.
    auto g = grad.to(at::kFloat).contiguous();
    const auto squares = g.square().add_(1e-30);
    if (p.dim() < 2) {
      auto& square = state.at("square");
      square.mul_(keep).add_(squares, 1.0 - keep);
      g.mul_(square.rsqrt());
    } else {
      auto &row = state.at("row"), &column = state.at("column");
      const auto matrix = squares.view({row.numel(), column.numel()});
      row.mul_(keep).add_(matrix.mean(1), 1.0 - keep);
      column.mul_(keep).add_(matrix.mean(0), 1.0 - keep);
      auto flat = g.view({row.numel(), column.numel()});
      flat.mul_((row / row.mean()).rsqrt_().unsqueeze(1)).mul_(column.rsqrt().unsqueeze(0));
    }
    g.div_(std::max(1.0, root_mean_square(g) / options_.clip_threshold));
    const double step = rate * std::max(options_.least_scale, root_mean_square(p.to(at::kFloat)));
    decay(p, step, options_);
    add_change(p, g, -step);
  }

 private:
  RuleOptions options_;
};

const bool registered = register_rule(
    "adalomo", [](const RuleOptions& options) { return std::make_unique<AdaLomoRule>(options); });

}  // namespace
}  // namespace budwood::optim
