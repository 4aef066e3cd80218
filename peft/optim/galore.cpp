#include <ATen/ATen.h>

#include <budwood/peft/optim/adamw.h>
#include <budwood/peft/svd.h>
#include <algorithm>
#include <cmath>

namespace budwood::optim {
namespace {

// Up to so many rows the directions are exact; above, subspace iteration finds them in a fraction
// of the time.
constexpr int64_t kExactSide = 1024;

at::Tensor left_vectors(const at::Tensor& g, int64_t rank) {
  if (g.size(0) > kExactSide) return leading_triplets(g, rank, /*iterations=*/3).u.to(at::kDouble);
  const auto wide = g.to(at::kDouble);
  const auto [values, vectors] = at::linalg_eigh(wide.mm(wide.t()));
  return vectors.narrow(1, vectors.size(1) - rank, rank).flip(1);
}

// The r leading left singular vectors of g [m, n] as rows, m <= n; the largest entry of each is
// positive, so that they are the same on every run.
at::Tensor leading_vectors(const at::Tensor& g, int64_t rank) {
  auto leading = left_vectors(g, rank).t().contiguous();
  const auto places = leading.abs().argmax(1, /*keepdim=*/true);
  leading.mul_(leading.gather(1, places).sign());
  return leading.to(at::kFloat);
}

/// GaLore (arXiv 2403.03507): Adam on a gradient of rank r. The shorter side of G [m, n] is
/// projected on the leading singular vectors of a recent gradient, "projection" [r, min(m, n)];
/// moments are [r, max(m, n)]. They are carried over a refresh of the projection as they are.
/// Vectors, tables and matrices that are no larger than the rank are AdamW's.
class GaLoreRule final : public UpdateRule {
 public:
  explicit GaLoreRule(const RuleOptions& options) : options_(options), rest_(options) {}

  const UpdateRule& rule_for(const std::string& path, const at::Tensor& p) const override {
    static constexpr const char* kTables[] = {"embed", "lm_head", "wte", "wpe"};
    const bool table = std::ranges::any_of(
        kTables, [&](const char* name) { return path.find(name) != std::string::npos; });
    if (table || p.dim() != 2 || std::min(p.size(0), p.size(1)) < options_.rank) return rest_;
    return *this;
  }

  TensorState fresh(const at::Tensor& p) const override {
    const auto options = p.options().dtype(at::kFloat).requires_grad(false);
    const int64_t shorter = std::min(p.size(0), p.size(1)), longer = std::max(p.size(0), p.size(1));
    return {{"projection", at::zeros({options_.rank, shorter}, options)},
            {"exp_avg", at::zeros({options_.rank, longer}, options)},
            {"exp_avg_sq", at::zeros({options_.rank, longer}, options)},
            {"step", at::scalar_tensor(int64_t{0}, at::kLong)}};
  }

  void update(at::Tensor p, at::Tensor grad, TensorState& state, double rate) const override {
    const bool tall = p.size(0) > p.size(1);
    const auto g = tall ? grad.to(at::kFloat).t() : grad.to(at::kFloat);  // [shorter, longer]
    const auto count = count_step(state);
    auto &projection = state.at("projection"), &mean = state.at("exp_avg"),
         &square = state.at("exp_avg_sq");
    if ((count - 1) % options_.refresh_every == 0)
      projection.copy_(leading_vectors(g, options_.rank));
    const auto low = projection.mm(g);
    mean.mul_(options_.beta1).add_(low, 1.0 - options_.beta1);
    square.mul_(options_.beta2).addcmul_(low, low, 1.0 - options_.beta2);
    const auto t = static_cast<double>(count);
    const double step =
        rate * std::sqrt(1.0 - std::pow(options_.beta2, t)) / (1.0 - std::pow(options_.beta1, t));
    const auto full = projection.t().mm(mean / square.sqrt().add_(options_.eps));
    add_change(p, tall ? full.t() : full, -step * options_.scale);
    decay(p, rate, options_);
  }

 private:
  RuleOptions options_;
  AdamWRule rest_;
};

const bool registered = register_rule(
    "galore", [](const RuleOptions& options) { return std::make_unique<GaLoreRule>(options); });

}  // namespace
}  // namespace budwood::optim
