#include <budwood/peft/ops/norm.h>

#include "gradients.h"

using operator_cases::check_operator;
using operator_cases::Tensors;

namespace {

constexpr double kEps = 1e-5;

at::Tensor rms(const Tensors& t) {
  return t[1] * t[0] * torch::rsqrt(t[0].square().mean(-1, true) + kEps);
}
at::Tensor layer(const Tensors& t) {
  return torch::layer_norm(t[0], {t[0].size(-1)}, t[1], t[2], kEps);
}

}  // namespace

TEST_CASE("norms have the formula's values and gradients, in fp32 and float64") {
  torch::manual_seed(0);
  for (const auto type : {torch::kFloat, torch::kDouble})
    for (const int64_t n : {1, 7, 24}) {
      CAPTURE(n);
      const auto x = torch::randn({3, 5, n}, type), w = torch::randn({n}, type),
                 b = torch::randn({n}, type);
      const double bound = type == torch::kDouble ? 1e-10 : 1e-4;
      check_operator(
          {x, w}, [](const Tensors& t) { return budwood::ops::rms_norm(t[0], t[1], kEps); }, rms,
          bound);
      // A single element has no deviation: its gradient is nothing but rounding.
      if (n > 1)
        check_operator(
            {x, w, b},
            [](const Tensors& t) { return budwood::ops::layer_norm(t[0], t[1], t[2], kEps); },
            layer, bound);
    }
}

TEST_CASE("rows that are not contiguous, no rows, NaN, and weights that do not fit") {
  torch::manual_seed(0);
  const auto w = torch::randn({6});
  const auto x = torch::randn({6, 4}).t();
  CHECK(torch::allclose(budwood::ops::rms_norm(x, w, kEps), rms({x, w}), 1e-5, 1e-6));
  CHECK((budwood::ops::rms_norm(torch::randn({0, 6}), w, kEps).sizes() == at::IntArrayRef({0, 6})));
  auto nan = torch::randn({2, 6});
  nan[1][3] = NAN;
  const auto y = budwood::ops::rms_norm(nan, w, kEps);
  CHECK_FALSE(y[0].isnan().any().item<bool>());
  CHECK(y[1].isnan().all().item<bool>());
  CHECK_THROWS(budwood::ops::rms_norm(torch::randn({2, 5}), w, kEps));
  CHECK_THROWS(budwood::ops::layer_norm(torch::randn({2, 6}), w, torch::randn({5}), kEps));
}

TEST_CASE("without need_weight a backward gives the gradient of x alone") {
  torch::manual_seed(0);
  const auto x = torch::randn({4, 6}), w = torch::randn({6}), g = torch::randn({4, 6});
  const auto [dx, dw] = budwood::ops::rms_norm_backward(g, x, w, kEps, true);
  const auto [alone, none] = budwood::ops::rms_norm_backward(g, x, w, kEps, false);
  CHECK(torch::equal(dx, alone));
  CHECK(dw.sizes() == w.sizes());
  CHECK(none.numel() == 0);
}
