#include <budwood/peft/ops/affine_linear.h>
#include <budwood/quant/quantize.h>

#include "gradients.h"

using budwood::ops::affine_linear;
using budwood::quant::quantize;
using operator_cases::check_operator;
using operator_cases::Tensors;

TEST_CASE("scales and zero points are trained on fixed codes: values and gradients of float64") {
  torch::manual_seed(0);
  for (const char* format : {"int4", "affine8"}) {
    CAPTURE(format);
    const auto base = quantize(torch::randn({6, 64}), {.format = format, .block_size = 16});
    // Scales of 1 and zero points of 0 show the codes themselves.
    const auto ones = torch::ones({6, 4});
    const auto codes = budwood::ops::with_scales(base, ones, torch::zeros({6, 4}))
                           .rows(0, 6, torch::kDouble)
                           .view({6, 4, 16});
    const auto exact = [&](const Tensors& t) {
      const auto w = t[1].unsqueeze(2) * (codes - t[2].unsqueeze(2));
      return t[0].matmul(w.view({6, 64}).t()) + t[3];
    };
    const auto own = [&](const Tensors& t) { return affine_linear(t[0], base, t[3], t[1], t[2]); };
    for (const int64_t tokens : {1, 9})
      check_operator({torch::randn({tokens, 64}), torch::rand({6, 4}) + 0.5,
                      torch::randn({6, 4}) + 7, torch::randn({6})},
                     own, exact, 2e-3);
  }
}

TEST_CASE("the base's own zero points stay where none are given, and other bases are refused") {
  torch::manual_seed(0);
  const auto base = quantize(torch::randn({6, 64}), {.format = "int4", .block_size = 16});
  const auto x = torch::randn({3, 64});
  CHECK(budwood::ops::is_affine(base));
  CHECK(torch::equal(affine_linear(x, base, {}, base.parts[1]), base.linear(x)));
  CHECK(torch::allclose(affine_linear(x, base, {}, 2 * base.parts[1]), 2 * base.linear(x), 1e-5,
                        1e-5));
  CHECK_THROWS(affine_linear(x, base, {}, torch::ones({6, 3})));
  const auto nf4 = quantize(torch::randn({6, 64}), {.format = "nf4"});
  CHECK_FALSE(budwood::ops::is_affine(nf4));
  CHECK_THROWS(affine_linear(x, nf4, {}, torch::ones({6, 4})));
}
