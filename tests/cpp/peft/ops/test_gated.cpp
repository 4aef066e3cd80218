#include <budwood/peft/ops/gated.h>

#include "gradients.h"

using operator_cases::check_operator;
using operator_cases::Tensors;

TEST_CASE("gated activations have the formula's values and gradients, in fp32 and float64") {
  torch::manual_seed(0);
  for (const auto type : {torch::kFloat, torch::kDouble}) {
    const double bound = type == torch::kDouble ? 1e-10 : 1e-4;
    const auto gate = torch::randn({3, 5, 11}, type) * 3, up = torch::randn({3, 5, 11}, type);
    check_operator(
        {gate, up}, [](const Tensors& t) { return budwood::ops::swiglu(t[0], t[1]); },
        [](const Tensors& t) { return torch::silu(t[0]) * t[1]; }, bound);
    for (const char* approximate : {"none", "tanh"})
      check_operator(
          {gate, up},
          [&](const Tensors& t) { return budwood::ops::geglu(t[0], t[1], approximate); },
          [&](const Tensors& t) { return at::gelu(t[0], approximate) * t[1]; }, bound);
  }
}

TEST_CASE("large, infinite and missing values end as the formula says") {
  const auto gate = torch::tensor({-200.0f, 200.0f, 0.0f, -INFINITY, NAN});
  const auto up = torch::full({5}, 2.0f);
  const auto y = budwood::ops::swiglu(gate, up);
  CHECK(y[0].item<float>() == 0);
  CHECK(y[1].item<float>() == 400);
  CHECK(y[2].item<float>() == 0);
  CHECK(y[4].isnan().item<bool>());
  CHECK((budwood::ops::swiglu(torch::randn({0, 3}), torch::randn({0, 3})).numel() == 0));
  CHECK_THROWS(budwood::ops::swiglu(gate, torch::ones({4})));
  CHECK_THROWS(budwood::ops::swiglu(gate, up.to(torch::kDouble)));
  CHECK_THROWS_WITH(budwood::ops::geglu(gate, up, "sigmoid"), doctest::Contains("sigmoid"));
}
