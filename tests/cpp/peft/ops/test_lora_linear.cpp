#include <doctest/doctest.h>
#include <torch/torch.h>

#include <budwood/peft/ops/lora_linear.h>
#include <budwood/quant/ops.h>

using budwood::quant::Weight;

TEST_CASE("lora_linear and linear give autograd's values and gradients in float64") {
  torch::manual_seed(0);
  for (const bool transposed : {false, true}) {
    const auto w = torch::randn({7, 5}, torch::kDouble);
    const auto weight =
        transposed ? Weight::dense_transposed(w.t().contiguous()) : Weight::dense(w);
    auto x = torch::randn({2, 3, 5}, torch::kDouble).requires_grad_();
    auto bias = torch::randn({7}, torch::kDouble).requires_grad_();
    auto a = torch::randn({2, 5}, torch::kDouble).requires_grad_();
    auto b = torch::randn({7, 2}, torch::kDouble).requires_grad_();
    const auto g = torch::randn({2, 3, 7}, torch::kDouble);
    const auto y = budwood::ops::lora_linear(x, weight, bias, a, b, 0.7);
    const auto wanted = x.matmul(w.t()) + bias + 0.7 * x.matmul(a.t()).matmul(b.t());
    CHECK(torch::allclose(y, wanted, 1e-12, 1e-12));
    const auto found = torch::autograd::grad({y}, {x, bias, a, b}, {g});
    const auto exact = torch::autograd::grad({wanted}, {x, bias, a, b}, {g});
    for (size_t i = 0; i < found.size(); ++i)
      CHECK(torch::allclose(found[i], exact[i], 1e-12, 1e-12));
    const auto plain = budwood::quant::linear(x, weight, bias);
    CHECK(torch::allclose(plain, x.matmul(w.t()) + bias, 1e-12, 1e-12));
    CHECK(torch::allclose(torch::autograd::grad({plain}, {x}, {g})[0], g.matmul(w), 1e-12, 1e-12));
  }
}

TEST_CASE("a frozen weight gets no gradient, a trained one its own") {
  auto w = torch::randn({4, 3}, torch::kDouble).requires_grad_();
  const auto x = torch::randn({6, 3}, torch::kDouble);
  const auto y = budwood::quant::linear(x, Weight::dense(w));
  y.square().sum().backward();
  CHECK(torch::allclose(w.grad(), 2 * y.detach().t().matmul(x), 1e-12, 1e-12));
  CHECK_THROWS(budwood::ops::lora_linear(x, Weight::dense(w), {},
                                         torch::randn({1, 3}, torch::kDouble),
                                         torch::randn({4, 1}, torch::kDouble), 1.0));
}

TEST_CASE("no tokens and one token are ordinary inputs") {
  const auto w = torch::randn({4, 3});
  const auto a = torch::randn({2, 3}), b = torch::randn({4, 2});
  for (const int64_t tokens : {0, 1}) {
    auto x = torch::randn({tokens, 3}).requires_grad_();
    const auto y = budwood::ops::lora_linear(x, Weight::dense(w), {}, a, b, 1.0);
    CHECK(y.sizes() == at::IntArrayRef({tokens, 4}));
    y.sum().backward();
    CHECK(x.grad().sizes() == x.sizes());
  }
  CHECK_THROWS(budwood::ops::lora_linear(torch::randn({2, 4}), Weight::dense(w), {}, a, b, 1.0));
  CHECK_THROWS(budwood::ops::lora_linear(torch::randn({2, 3}), Weight::dense(w), {}, a,
                                         torch::randn({4, 3}), 1.0));
}
