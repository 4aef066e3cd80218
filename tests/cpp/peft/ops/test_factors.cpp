#include <budwood/peft/ops/factors.h>

#include "gradients.h"

using budwood::ops::factor_gradient;
using budwood::ops::times_factor;

TEST_CASE("products with factors are float64's to rounding, whatever tokens and layout") {
  torch::manual_seed(0);
  for (const auto type : {torch::kFloat, torch::kDouble, torch::kBFloat16})
    for (const int64_t tokens : {0, 1, 9, 130}) {
      const auto x = torch::randn({tokens, 70}).to(type), a = torch::randn({5, 70});
      const auto exact_x = x.to(torch::kDouble), exact_a = a.to(torch::kDouble);
      const auto u = times_factor(x, a.t());
      CHECK((u.scalar_type() == torch::kFloat));
      CHECK(torch::allclose(u.to(torch::kDouble), exact_x.matmul(exact_a.t()), 1e-4, 1e-4));
      CHECK(torch::allclose(times_factor(x, a.t().contiguous()), u, 1e-4, 1e-4));
      const auto narrow = torch::randn({tokens, 8}).narrow(1, 2, 5);
      const auto gradient = factor_gradient(narrow, x, 0.5);
      CHECK((gradient.sizes() == at::IntArrayRef({5, 70})));
      CHECK(torch::allclose(gradient.to(torch::kDouble),
                            0.5 * narrow.to(torch::kDouble).t().matmul(exact_x), 1e-4, 1e-4));
    }
}

TEST_CASE("float64 factors are multiplied in float64") {
  torch::manual_seed(0);
  const auto x = torch::randn({6, 7}, torch::kDouble), a = torch::randn({3, 7}, torch::kDouble);
  CHECK(torch::allclose(times_factor(x, a.t()), x.matmul(a.t()), 1e-14, 1e-14));
  const auto u = torch::randn({6, 3}, torch::kDouble);
  CHECK(torch::allclose(factor_gradient(u, x, 2.0), 2 * u.t().matmul(x), 1e-13, 1e-13));
}
