#include <ATen/ATen.h>

#include <budwood/peft/optim/update_rule.h>

namespace budwood::optim {
namespace {

/// Plain gradient descent, which is all of LOMO (arXiv 2306.09782) that is not its order: it
/// remembers nothing.
class LomoRule final : public UpdateRule {
 public:
  explicit LomoRule(const RuleOptions& options) : options_(options) {}
  TensorState fresh(const at::Tensor&) const override { return {}; }
  void update(at::Tensor p, at::Tensor grad, TensorState&, double rate) const override {
    decay(p, rate, options_);
    add_change(p, grad, -rate);
  }

 private:
  RuleOptions options_;
};

const bool registered = register_rule(
    "lomo", [](const RuleOptions& options) { return std::make_unique<LomoRule>(options); });

}  // namespace
}  // namespace budwood::optim
