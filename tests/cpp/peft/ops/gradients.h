#pragma once

#include <doctest/doctest.h>
#include <torch/torch.h>

#include <functional>
#include <vector>

/// What the tests of operators share.
namespace operator_cases {

using Tensors = std::vector<at::Tensor>;
using Formula = std::function<at::Tensor(const Tensors&)>;

/// found(inputs) beside exact(inputs in float64): the value, its dtype and every gradient of a
/// random slope, taken twice from one graph with equal bits.
inline void check_operator(const Tensors& inputs, const Formula& found, const Formula& exact,
                           double bound) {
  Tensors own, wide;
  for (const auto& t : inputs) {
    own.push_back(t.detach().requires_grad_());
    wide.push_back(t.detach().to(at::kDouble).requires_grad_());
  }
  const auto y = found(own), wanted = exact(wide);
  REQUIRE(y.sizes() == wanted.sizes());
  CHECK((y.scalar_type() == inputs[0].scalar_type()));
  CHECK(torch::allclose(y.to(at::kDouble), wanted, bound, bound));
  const auto slope = torch::randn(y.sizes(), y.options());
  const auto grads = torch::autograd::grad({y}, own, {slope}, /*retain_graph=*/true);
  const auto again = torch::autograd::grad({y}, own, {slope});
  const auto wanted_grads = torch::autograd::grad({wanted}, wide, {slope.to(at::kDouble)});
  for (size_t i = 0; i < grads.size(); ++i) {
    CAPTURE(i);
    CHECK((grads[i].scalar_type() == inputs[i].scalar_type()));
    CHECK(torch::allclose(grads[i].to(at::kDouble), wanted_grads[i], bound, bound));
    CHECK(torch::equal(grads[i], again[i]));
  }
}

}  // namespace operator_cases
