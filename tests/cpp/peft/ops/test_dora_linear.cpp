#include <doctest/doctest.h>
#include <torch/torch.h>

#include <budwood/peft/ops/dora_linear.h>
#include <budwood/quant/quantize.h>

using budwood::ops::dora_linear;
using budwood::quant::Weight;

TEST_CASE("dora_linear gives autograd's values and gradients in float64, zero gains included") {
  torch::manual_seed(0);
  for (const bool transposed : {false, true})
    for (const bool with_bias : {false, true}) {
      const auto w = torch::randn({7, 5}, torch::kDouble);
      const auto weight =
          transposed ? Weight::dense_transposed(w.t().contiguous()) : Weight::dense(w);
      auto x = torch::randn({2, 3, 5}, torch::kDouble).requires_grad_();
      auto bias = torch::randn({7}, torch::kDouble).requires_grad_();
      auto a = torch::randn({2, 5}, torch::kDouble).requires_grad_();
      auto b = torch::randn({7, 2}, torch::kDouble).requires_grad_();
      auto gain = torch::randn({7}, torch::kDouble);
      gain[3] = 0;
      gain.requires_grad_();
      const auto slope = torch::randn({2, 3, 7}, torch::kDouble);
      const auto y =
          dora_linear(x, weight, with_bias ? std::optional(bias) : std::nullopt, a, b, gain, 0.7);
      auto wanted = gain * (x.matmul(w.t()) + 0.7 * x.matmul(a.t()).matmul(b.t()));
      std::vector<at::Tensor> leaves = {x, a, b, gain};
      if (with_bias) {
        wanted = wanted + bias;
        leaves.push_back(bias);
      }
      CHECK(torch::allclose(y, wanted, 1e-12, 1e-12));
      const auto found = torch::autograd::grad({y}, leaves, {slope}, /*retain_graph=*/true);
      const auto again = torch::autograd::grad({y}, leaves, {slope});
      const auto exact = torch::autograd::grad({wanted}, leaves, {slope});
      for (size_t i = 0; i < found.size(); ++i) {
        CHECK(torch::allclose(found[i], exact[i], 1e-11, 1e-11));
        CHECK(torch::equal(found[i], again[i]));
      }
    }
}

TEST_CASE("a 4-bit base has the values and gradients of its dequantised matrix") {
  torch::manual_seed(0);
  const auto weight = budwood::quant::quantize(torch::randn({48, 64}), {.format = "nf4"});
  const auto w = weight.rows(0, 48, torch::kDouble);
  for (const int64_t tokens : {1, 5, 70}) {
    auto x = torch::randn({tokens, 64}).requires_grad_();
    auto a = torch::randn({4, 64}).requires_grad_(), b = torch::randn({48, 4}).requires_grad_();
    auto gain = (torch::rand({48}) + 0.5).requires_grad_();
    const auto slope = torch::randn({tokens, 48});
    const auto y = dora_linear(x, weight, {}, a, b, gain, 2.0);
    const auto found = torch::autograd::grad({y}, {x, a, b, gain}, {slope});
    std::vector<at::Tensor> wide;
    for (const auto& t : {x, a, b, gain})
      wide.push_back(t.detach().to(torch::kDouble).requires_grad_());
    const auto wanted =
        wide[3] * (wide[0].matmul(w.t()) + 2.0 * wide[0].matmul(wide[1].t()).matmul(wide[2].t()));
    const auto exact = torch::autograd::grad({wanted}, wide, {slope.to(torch::kDouble)});
    CHECK(torch::allclose(y.to(torch::kDouble), wanted, 1e-5, 1e-4));
    for (size_t i = 0; i < found.size(); ++i)
      CHECK(torch::allclose(found[i].to(torch::kDouble), exact[i], 1e-4, 1e-3));
  }
}

TEST_CASE("no tokens are ordinary, and what does not fit is refused") {
  const auto weight = Weight::dense(torch::randn({4, 3}));
  const auto a = torch::randn({2, 3}), b = torch::randn({4, 2}), gain = torch::ones({4});
  auto none = torch::randn({0, 3}).requires_grad_();
  const auto y = dora_linear(none, weight, {}, a, b, gain, 1.0);
  CHECK((y.sizes() == at::IntArrayRef({0, 4})));
  y.sum().backward();
  CHECK(none.grad().sizes() == none.sizes());
  const auto x = torch::randn({2, 3});
  CHECK_THROWS_WITH(dora_linear(x, weight, {}, a, b, torch::ones({3}), 1.0),
                    doctest::Contains("the gain is [4]"));
  CHECK_THROWS_WITH(dora_linear(x, weight, {}, a, b.t(), gain, 1.0),
                    doctest::Contains("B is [4, 2]"));
  CHECK_THROWS_WITH(dora_linear(torch::randn({2, 4}), weight, {}, a, b, gain, 1.0),
                    doctest::Contains("last dimension"));
  CHECK_THROWS_WITH(dora_linear(x, weight, {}, a, b, gain.to(torch::kDouble), 1.0),
                    doctest::Contains("one dtype"));
  CHECK_THROWS_WITH(
      dora_linear(x, Weight::dense(torch::randn({4, 3}).requires_grad_()), {}, a, b, gain, 1.0),
      doctest::Contains("frozen"));
}
