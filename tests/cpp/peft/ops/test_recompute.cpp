#include <doctest/doctest.h>
#include <torch/torch.h>

#include <budwood/peft/ops/recompute.h>

namespace {

struct Case {
  at::Tensor x = torch::randn({8, 6}).requires_grad_();
  at::Tensor w = torch::randn({6, 6}).requires_grad_();
  int runs = 0;

  at::Tensor block(const at::Tensor& input) {
    ++runs;
    return torch::dropout(input.matmul(w).tanh(), 0.5, /*train=*/true);
  }
};

}  // namespace

TEST_CASE("a block that runs again has the gradients of one that is kept, dropout included") {
  torch::manual_seed(3);
  Case c;
  torch::manual_seed(7);
  const auto kept = torch::autograd::grad({c.block(c.x).square().sum()}, {c.x, c.w});
  const auto after = torch::rand({1});
  torch::manual_seed(7);
  const auto y =
      budwood::ops::recompute([&](const at::Tensor& x) { return c.block(x); }, c.x, {c.w});
  const auto loss = y.square().sum();
  const auto again = torch::autograd::grad({loss}, {c.x, c.w}, {}, /*retain_graph=*/true);
  // The backward has drawn nothing for others.
  CHECK(torch::equal(torch::rand({1}), after));
  const auto twice = torch::autograd::grad({loss}, {c.x, c.w});
  CHECK(c.runs == 4);
  for (size_t i = 0; i < 2; ++i) {
    CHECK(torch::equal(again[i], kept[i]));
    CHECK(torch::equal(twice[i], kept[i]));
  }
}

TEST_CASE("parameters get gradients though the input requires none") {
  Case c;
  const auto x = c.x.detach();
  const auto y =
      budwood::ops::recompute([&](const at::Tensor& t) { return t.matmul(c.w); }, x, {c.w});
  y.sum().backward();
  CHECK(torch::allclose(c.w.grad(), x.t().matmul(torch::ones({8, 6}))));
}

TEST_CASE("without gradients the block runs once") {
  Case c;
  const torch::NoGradGuard off;
  budwood::ops::recompute([&](const at::Tensor& x) { return c.block(x); }, c.x, {c.w});
  CHECK(c.runs == 1);
}
