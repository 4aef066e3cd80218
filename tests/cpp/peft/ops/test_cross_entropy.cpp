#include <doctest/doctest.h>
#include <torch/torch.h>

#include <budwood/peft/ops/cross_entropy.h>

using budwood::ops::linear_cross_entropy;

TEST_CASE(
    "the chunked loss equals the whole one for every chunk size, with gradients of head and "
    "hidden") {
  torch::manual_seed(0);
  auto hidden = torch::randn({9, 5}, torch::kDouble).requires_grad_();
  auto head = torch::randn({11, 5}, torch::kDouble).requires_grad_();
  const auto labels = torch::tensor({3, -100, 0, 10, -100, 7, 2, 2, -100}, torch::kLong);
  const auto project = [&](const torch::Tensor& rows) { return rows.matmul(head.t()); };
  const auto whole = torch::nn::functional::cross_entropy(
      project(hidden).to(torch::kFloat), labels,
      torch::nn::functional::CrossEntropyFuncOptions().reduction(torch::kSum));
  const auto exact = torch::autograd::grad({whole}, {hidden, head});
  for (const int64_t chunk : {1, 2, 5, 6, 100}) {
    const auto loss = linear_cross_entropy(hidden, labels, project, {head}, {.chunk = chunk});
    CHECK(std::abs(loss.item<double>() - whole.item<double>()) < 1e-5);
    const auto found = torch::autograd::grad({loss * 3}, {hidden, head});
    for (size_t i = 0; i < 2; ++i) CHECK(torch::allclose(found[i], 3 * exact[i], 1e-5, 1e-6));
    torch::NoGradGuard no_grad;
    CHECK(std::abs(
              linear_cross_entropy(hidden, labels, project, {}, {.chunk = chunk}).item<double>() -
              whole.item<double>()) < 1e-5);
  }
}

TEST_CASE("with nothing counted the loss is zero and so is the gradient") {
  auto hidden = torch::randn({3, 5}).requires_grad_();
  const auto loss = linear_cross_entropy(hidden, torch::full({3}, -100, torch::kLong),
                                         [](const torch::Tensor& rows) { return rows; });
  CHECK(loss.item<float>() == 0);
  loss.backward();
  CHECK(torch::equal(hidden.grad(), torch::zeros({3, 5})));
}
