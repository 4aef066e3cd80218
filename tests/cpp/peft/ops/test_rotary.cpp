#include <budwood/peft/ops/rotary.h>

#include "gradients.h"

using budwood::ops::rotate;
using operator_cases::check_operator;
using operator_cases::Tensors;

TEST_CASE("pairs are turned by their token's angle, forward and backward") {
  torch::manual_seed(0);
  // Whole heads and a part of them, odd heads among them.
  for (const auto& [d, half] : std::vector<std::array<int64_t, 2>>{{8, 4}, {8, 3}, {7, 2}})
    for (const auto type : {torch::kFloat, torch::kDouble}) {
      const auto angles = torch::randn({5, half}, torch::kDouble);
      const auto cos = angles.cos(), sin = angles.sin();
      const auto exact = [&](const Tensors& t) {
        const auto a = t[0].slice(-1, 0, half), b = t[0].slice(-1, half, 2 * half);
        const auto c = cos.unsqueeze(1), s = sin.unsqueeze(1);
        return torch::cat({a * c - b * s, b * c + a * s, t[0].slice(-1, 2 * half)}, -1);
      };
      check_operator(
          {torch::randn({5, 2, d}, type)},
          [&](const Tensors& t) { return rotate(t[0], cos.to(type), sin.to(type)); }, exact,
          type == torch::kDouble ? 1e-12 : 1e-5);
    }
}

TEST_CASE("angles that do not fit are refused") {
  const auto x = torch::randn({5, 2, 8});
  CHECK_THROWS(rotate(x, torch::randn({5, 5}), torch::randn({5, 5})));
  CHECK_THROWS(rotate(x, torch::randn({4, 2}), torch::randn({4, 2})));
  CHECK_THROWS(rotate(x, torch::randn({5, 2}), torch::randn({5, 3})));
}
