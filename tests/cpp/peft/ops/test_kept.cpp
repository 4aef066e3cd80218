#include <doctest/doctest.h>
#include <torch/torch.h>

#include <budwood/peft/ops/attention.h>
#include <budwood/peft/ops/dora_linear.h>
#include <budwood/peft/ops/gated.h>
#include <budwood/peft/ops/kept.h>
#include <budwood/peft/ops/lora_linear.h>
#include <budwood/peft/ops/norm.h>
#include <budwood/peft/ops/projections.h>
#include <budwood/quant/error.h>

using namespace budwood::ops;
using budwood::quant::Weight;
using Tensors = std::vector<at::Tensor>;

TEST_CASE("activations are kept as they are, or rounded once for all who keep them") {
  torch::manual_seed(0);
  const auto x = torch::randn({6, 8});
  CHECK(keep(x).is_same(x));
  {
    const ScopedKeptType narrow(at::kBFloat16);
    CHECK((kept_type(at::kFloat) == at::kBFloat16));
    CHECK((kept_type(at::kDouble) == at::kDouble));
    const auto kept = keep(x);
    CHECK(torch::equal(kept, x.to(at::kBFloat16)));
    CHECK(keep(x.view({2, 3, 8})).data_ptr() == kept.data_ptr());
    CHECK(torch::equal(restored(kept, at::kFloat), x.to(at::kBFloat16).to(at::kFloat)));
    // Parameters, other dtypes and what is not defined stay.
    for (const auto& t : {torch::randn({8}), x.to(at::kDouble), x.to(at::kHalf), at::Tensor()})
      CHECK(keep(t).is_same(t));
    // A value that was changed in place is another one.
    x.mul_(2);
    CHECK(torch::equal(keep(x), x.to(at::kBFloat16)));
    // Memory that came back from somebody else's tensor too.
    for (int i = 0; i < 20; ++i) {
      const auto fresh = torch::randn({6, 8});
      CHECK(torch::equal(keep(fresh), fresh.to(at::kBFloat16)));
    }
    CHECK(torch::equal(keep(x.t()), x.t().to(at::kBFloat16)));
  }
  CHECK(keep(x).is_same(x));
  CHECK_THROWS_WITH_AS(set_kept_type(at::kHalf), doctest::Contains("float32 or bfloat16"),
                       budwood::Error);
}

TEST_CASE("with rounded activations values keep their bits and gradients bf16's rounding") {
  torch::manual_seed(0);
  const auto w = Weight::dense(torch::randn({12, 16}) * 0.3);
  const auto random = [](at::IntArrayRef shape) { return torch::randn(shape).requires_grad_(); };
  const auto x = random({9, 16}), y = random({9, 16}), scale = random({16}), a = random({4, 16}),
             b = random({12, 4}), gain = random({12}), q = random({9, 2, 8}), k = random({9, 2, 8}),
             v = random({9, 2, 8});
  const std::vector<std::pair<std::function<at::Tensor()>, Tensors>> operators = {
      {[&] { return rms_norm(x, scale, 1e-5); }, {x, scale}},
      {[&] { return layer_norm(x, scale, scale, 1e-5); }, {x, scale}},
      {[&] { return swiglu(x, y); }, {x, y}},
      {[&] { return lora_linear(x, w, {}, a, b, 0.5); }, {x, a, b}},
      {[&] { return dora_linear(x, w, {}, a, b, gain, 0.5); }, {x, a, b, gain}},
      // Attention itself is exact: what it made is read by a projection.
      {[&] {
         const auto made = attention(q, k, v, {{0, 4, 9}, {0, 4, 9}, 0.3});
         return lora_linear(made.view({9, 16}) * 1.5, w, {}, a, b, 0.5);
       },
       {q, k, v, a, b}},
      {[&] {
         return project(Source::rms_norm(x, scale, 1e-5),
                        {{.weight = w, .a = a, .b = b, .gain = gain}})[0];
       },
       {x, scale, a, b, gain}},
      {[&] {
         return project(Source::gated(budwood::kernels::Gate::silu, x, y), {{.weight = w}})[0];
       },
       {x, y}},
  };
  for (size_t i = 0; i < operators.size(); ++i) {
    CAPTURE(i);
    const auto& [run, leaves] = operators[i];
    const auto exact = run();
    const auto slope = torch::randn(exact.sizes());
    const auto wanted = torch::autograd::grad({exact}, leaves, {slope});
    at::Tensor value;
    {
      const ScopedKeptType narrow(at::kBFloat16);
      value = run();
    }
    CHECK(torch::equal(value, exact));
    const auto found = torch::autograd::grad({value}, leaves, {slope});
    bool differs = false;
    for (size_t j = 0; j < found.size(); ++j) {
      CAPTURE(j);
      CHECK((found[j].scalar_type() == at::kFloat));
      CHECK(((found[j] - wanted[j]).norm() / wanted[j].norm()).item<float>() < 0.01);
      differs = differs || !torch::equal(found[j], wanted[j]);
    }
    CHECK(differs);
  }
}
