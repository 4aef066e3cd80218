#include <budwood/quant/calibrate/awq.h>

#include "inputs.h"

using namespace budwood::quant;
using namespace budwood::quant::calibrate;
using namespace budwood::quant::calibrate::testing;

TEST_CASE("the scale of least error is found, and ratio 0 is plain rounding") {
  torch::manual_seed(0);
  const auto x = inputs(500, 64), mean_abs = x.abs().mean(0);
  for (const int64_t bits : {4, 8}) {
    const std::vector<at::Tensor> weights = {torch::randn({24, 64}), torch::randn({16, 64})};
    const auto error = [&](const std::vector<at::Tensor>& rounded) {
      return loss(x, weights[0], rounded[0]) + loss(x, weights[1], rounded[1]);
    };
    const auto found = awq_scale(weights, mean_abs, error, {.bits = bits, .group_size = 32});
    const double plain = error({rtn(weights[0], bits, 32), rtn(weights[1], bits, 32)});
    CHECK(found.rtn_error == doctest::Approx(plain).epsilon(1e-9));
    double least = plain, ratio = 0;
    for (int step = 1; step < 20; ++step) {
      auto s = mean_abs.pow(step * 0.05).clamp_min(1e-4);
      s = s / (s.max() * s.min()).sqrt();
      const double here =
          error({rtn(weights[0] * s, bits, 32) / s, rtn(weights[1] * s, bits, 32) / s});
      if (here < least) {
        least = here;
        ratio = step * 0.05;
      }
    }
    CHECK(ratio > 0);
    CHECK(found.ratio == doctest::Approx(ratio));
    CHECK(found.error == doctest::Approx(least).epsilon(1e-6));
    CHECK((found.scale.max() * found.scale.min()).item<double>() == doctest::Approx(1.0));
  }
}

TEST_CASE("inputs of one size need no scale") {
  torch::manual_seed(1);
  const std::vector<at::Tensor> weights = {torch::randn({8, 32})};
  const auto error = [&](const std::vector<at::Tensor>& rounded) {
    return (rounded[0] - weights[0]).square().sum().item<double>();
  };
  const auto found = awq_scale(weights, torch::ones({32}), error);
  CHECK(found.ratio == 0);
  CHECK(torch::equal(found.scale, torch::ones({32})));
}

TEST_CASE("clipping never makes a group's output worse, and outliers worth clipping are clipped") {
  torch::manual_seed(2);
  const auto x = inputs(800, 72);
  auto w = torch::randn({40, 72});
  w.select(1, 3).mul_(4);
  for (const int64_t bits : {4, 8}) {
    const auto clipped = awq_clip(w, hessian(x), {.bits = bits, .group_size = 32});
    CHECK((clipped.abs() <= w.abs()).all().item<bool>());
    CHECK((clipped.abs() >= 0.499 * w.abs()).all().item<bool>());
    CHECK((clipped.abs() < w.abs()).any().item<bool>());
    const auto found = rtn(clipped, bits, 32), plain = rtn(w, bits, 32);
    double all = 0, before = 0;
    for (int64_t begin = 0; begin < 72; begin += 32) {
      const auto part = x.slice(1, begin, begin + 32).to(at::kDouble);
      const auto error = [&](const at::Tensor& q) {
        const auto delta = (q - w).slice(1, begin, begin + 32).to(at::kDouble);
        return part.matmul(delta.t()).square().sum(0);
      };
      CHECK((error(found) <= error(plain) * (1 + 1e-4)).all().item<bool>());
      all += error(found).sum().item<double>();
      before += error(plain).sum().item<double>();
    }
    CHECK(all < before);
  }
}

TEST_CASE("what AWQ cannot work with is refused") {
  const auto w = torch::randn({4, 8});
  const auto error = [](const std::vector<at::Tensor>&) { return NAN; };
  CHECK_THROWS_WITH_AS(awq_scale({w}, torch::ones({8}), error), doctest::Contains("ratio 0 is nan"),
                       budwood::Error);
  CHECK_THROWS_AS(awq_scale({}, torch::ones({8}), error), budwood::Error);
  CHECK_THROWS_AS(awq_scale({w}, torch::ones({7}), error), budwood::Error);
  CHECK_THROWS_AS(awq_clip(w, torch::eye(8), {.bits = 3}), budwood::Error);
  CHECK_THROWS_AS(awq_clip(w, torch::eye(8), {.least_clip = 0}), budwood::Error);
}
