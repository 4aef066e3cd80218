#include <limits>

#include "inputs.h"

using namespace budwood::quant::calibrate;

TEST_CASE("the running means are those of all tokens, however they come") {
  torch::manual_seed(0);
  const auto x = testing::inputs(3000, 24);
  HessianSum sum(24);
  sum.add(x.slice(0, 0, 1));
  sum.add(x.slice(0, 1, 1501).view({3, 500, 24}));
  sum.add(x.slice(0, 1501));
  sum.add(x.slice(0, 0, 0));
  CHECK(sum.tokens() == 3000);
  const auto exact = x.to(at::kDouble);
  const auto mean = exact.t().matmul(exact) / 3000;
  CHECK(((sum.mean() - mean).norm() / mean.norm()).item<double>() < 1e-6);
  CHECK(torch::allclose(sum.mean_abs().to(at::kDouble), exact.abs().mean(0), 1e-5));
}

TEST_CASE("the output error by the Hessian is that of the outputs") {
  torch::manual_seed(0);
  const auto x = testing::inputs(500, 24), delta = torch::randn({10, 24});
  const double wanted = testing::loss(x, delta, torch::zeros_like(delta)) / 500;
  CHECK(output_error(delta, testing::hessian(x)) == doctest::Approx(wanted).epsilon(1e-5));
}

TEST_CASE("inputs that are no inputs are refused") {
  HessianSum sum(8);
  CHECK_THROWS_WITH_AS(sum.add(torch::ones({2, 7})), doctest::Contains("[..., 8]"), budwood::Error);
  CHECK_THROWS_AS(sum.add(torch::ones({2, 8}, at::kLong)), budwood::Error);
  CHECK_THROWS_WITH_AS(sum.add(torch::full({2, 8}, std::numeric_limits<double>::quiet_NaN())),
                       doctest::Contains("not finite"), budwood::Error);
}
