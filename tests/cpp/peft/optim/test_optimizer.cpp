#include "../train/tiny.h"

#include <ATen/ATen.h>
#include <budwood/peft/optim/optimizer.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adamw.h>

#include <cmath>
#include <limits>

using namespace budwood;
using namespace budwood::optim;
using namespace budwood::train::testing;

namespace {

NamedTensors parameters(at::ScalarType type = at::kFloat) {
  auto generator = at::detail::createCPUGenerator(1);
  NamedTensors named;
  for (const auto& [name, shape] : std::vector<std::pair<std::string, std::vector<int64_t>>>{
           {"a", {5, 3}}, {"b", {7}}, {"c", {2, 2, 2}}})
    named.emplace_back(name, at::randn(shape, generator).to(type).requires_grad_());
  return named;
}

void set_gradients(const NamedTensors& named, int step, double size = 1.0) {
  auto generator = at::detail::createCPUGenerator(100 + static_cast<uint64_t>(step));
  for (const auto& [name, p] : named)
    p.mutable_grad() = (at::randn(p.sizes(), generator) * size).to(p.scalar_type());
}

std::shared_ptr<const UpdateRule> adamw(const RuleOptions& options) {
  return make_rule("adamw", options);
}

}  // namespace

TEST_CASE("AdamW equals torch's, with decay on tensors of two or more dimensions only") {
  const auto ours = parameters(), theirs = parameters();
  Optimizer optimizer(ours, adamw({.beta2 = 0.99, .eps = 1e-7, .weight_decay = 0.1}));
  const auto options = torch::optim::AdamWOptions(0).betas({0.9, 0.99}).eps(1e-7);
  auto decayed = std::make_unique<torch::optim::AdamWOptions>(options);
  decayed->weight_decay(0.1);
  auto plain = std::make_unique<torch::optim::AdamWOptions>(options);
  plain->weight_decay(0.0);
  torch::optim::AdamW reference(
      {torch::optim::OptimizerParamGroup({theirs[0].second, theirs[2].second}, std::move(decayed)),
       torch::optim::OptimizerParamGroup({theirs[1].second}, std::move(plain))});
  for (int step = 0; step < 20; ++step) {
    const double rate = 1e-2 / (1 + step);
    for (auto& group : reference.param_groups())
      static_cast<torch::optim::AdamWOptions&>(group.options()).lr(rate);
    set_gradients(ours, step);
    set_gradients(theirs, step);
    optimizer.step(rate);
    reference.step();
  }
  // LibTorch's C++ AdamW orders its operations otherwise; tests/python compares with Python's to
  // the bit.
  for (size_t i = 0; i < ours.size(); ++i)
    CHECK(at::allclose(ours[i].second, theirs[i].second, 1e-6, 1e-7));
}

TEST_CASE("a restored AdamW goes on to the bit, and its state is refused when it does not fit") {
  const auto one = parameters(), two = parameters();
  Optimizer first(one, adamw({}));
  for (int step = 0; step < 3; ++step) set_gradients(one, step), first.step(1e-2);
  NamedTensors state;
  for (const auto& [name, t] : first.state()) state.emplace_back(name, t.clone());
  for (size_t i = 0; i < one.size(); ++i) {
    at::NoGradGuard no_grad;
    two[i].second.copy_(one[i].second);
  }
  Optimizer second(two, adamw({}));
  second.restore(state);
  for (int step = 3; step < 6; ++step) {
    set_gradients(one, step), first.step(1e-2);
    set_gradients(two, step), second.step(1e-2);
  }
  for (size_t i = 0; i < one.size(); ++i) CHECK(one[i].second.equal(two[i].second));

  auto missing = state;
  missing.pop_back();
  CHECK(contains(message_of([&] { second.restore(missing); }), "no tensor 'step.c'"));
  auto wrong = state;
  wrong[0].second = wrong[0].second.t().contiguous();
  CHECK(contains(message_of([&] { second.restore(wrong); }), "'exp_avg.a' is float32 [3, 5]"));
  // Of a parameter that was never updated nothing is there.
  second.restore({});
  CHECK(second.state().empty());
}

TEST_CASE("parameters without a gradient stay as they are") {
  const auto named = parameters();
  Optimizer optimizer(named, adamw({.weight_decay = 0.5}));
  set_gradients(named, 0);
  named[0].second.mutable_grad() = at::Tensor();
  const auto before = named[0].second.detach().clone();
  optimizer.step(0.1);
  CHECK(named[0].second.equal(before));
  optimizer.zero_grad();
  for (const auto& [name, p] : named) CHECK_FALSE(p.grad().defined());
}

TEST_CASE("clipping equals torch's and leaves small and non-finite gradients alone") {
  const auto ours = parameters(), theirs = parameters();
  std::vector<at::Tensor> list;
  for (const auto& [name, p] : theirs) list.push_back(p);
  for (const double size : {0.01, 5.0}) {
    set_gradients(ours, 1, size);
    set_gradients(theirs, 1, size);
    const double norm = clip_gradients(ours, 1.0);
    CHECK(norm == doctest::Approx(torch::nn::utils::clip_grad_norm_(list, 1.0)).epsilon(1e-6));
    for (size_t i = 0; i < ours.size(); ++i)
      CHECK(at::allclose(ours[i].second.grad(), theirs[i].second.grad(), 1e-6, 1e-9));
  }
  set_gradients(ours, 2);
  const auto before = ours[1].second.grad().clone();
  clip_gradients(ours, 0.0);
  CHECK(ours[1].second.grad().equal(before));
  ours[0].second.mutable_grad().fill_(std::numeric_limits<float>::infinity());
  CHECK_FALSE(std::isfinite(clip_gradients(ours, 1.0)));
  CHECK(ours[1].second.grad().equal(before));
}

TEST_CASE("small updates of fp32 parameters are not lost") {
  NamedTensors one = {{"p", at::ones({1}).requires_grad_()}};
  Optimizer optimizer(one, adamw({.beta1 = 0.0, .beta2 = 0.0, .eps = 1e-12}));
  for (int i = 0; i < 1000; ++i) {
    one[0].second.mutable_grad() = at::ones({1});
    optimizer.step(1e-4);
  }
  CHECK(one[0].second.item<double>() == doctest::Approx(0.9).epsilon(1e-4));
}
