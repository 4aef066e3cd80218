#include <doctest/doctest.h>
#include <torch/torch.h>

#include <budwood/peft/ops/projections.h>
#include <budwood/quant/quantize.h>

#include <map>

using budwood::ops::Projection;
using budwood::ops::Source;
using budwood::quant::Weight;
using Tensors = std::vector<at::Tensor>;

namespace {

at::Tensor random(at::IntArrayRef shape, bool grad = true) {
  return torch::randn(shape).requires_grad_(grad);
}

struct Reading {
  Source source;
  std::function<at::Tensor(const Tensors&)> formula;  // in fp64
};

// Every reading, over 3 x 4 rows of 12.
std::map<std::string, Reading> readings() {
  const auto x = random({3, 4, 12}), y = random({3, 4, 12}), w = random({12}), b = random({12});
  const auto rms = [](const Tensors& t) {
    return t[1] * t[0] * torch::rsqrt(t[0].square().mean(-1, true) + 1e-5);
  };
  const auto layer = [](const Tensors& t) {
    return torch::layer_norm(t[0], {12}, t[1], t[2], 1e-5);
  };
  const auto gated = [](const Tensors& t) { return torch::silu(t[0]) * t[1]; };
  return {
      {"plain", {Source::plain(x), [](const Tensors& t) { return t[0]; }}},
      {"rms_norm", {Source::rms_norm(x, w, 1e-5), rms}},
      {"layer_norm", {Source::layer_norm(x, w, b, 1e-5), layer}},
      {"gated", {Source::gated(budwood::kernels::Gate::silu, x, y), gated}},
      {"gelu", {Source::gelu(x, "tanh"), [](const Tensors& t) { return at::gelu(t[0], "tanh"); }}},
  };
}

// What projects to 7, with a bias and factors; to 5, bare; to 3 with factors alone; then each of
// them with a gain.
std::vector<Projection> six(bool packed) {
  std::vector<Projection> all;
  for (const int64_t out : {7, 5, 3, 7, 5, 3}) {
    const auto w = torch::randn({out, 12});
    all.push_back(
        {.weight = packed ? budwood::quant::quantize(w, {.format = "int8"}) : Weight::dense(w)});
  }
  for (const size_t i : {0, 3}) all[i].bias = random({7});
  for (const size_t i : {0, 2, 3, 5}) {
    all[i].a = random({2 + static_cast<int64_t>(i), 12});
    all[i].b = random({all[i].weight.out, 2 + static_cast<int64_t>(i)});
    all[i].scaling = 0.7;
  }
  for (const size_t i : {3, 4, 5}) {
    all[i].gain = torch::randn({all[i].weight.out});
    all[i].gain[1] = 0;
    all[i].gain.requires_grad_();
  }
  return all;
}

Tensors leaves_of(const Source& source, const std::vector<Projection>& projections) {
  Tensors leaves = source.inputs;
  for (const auto& p : projections)
    for (const auto& t : {p.bias, p.a, p.b, p.gain})
      if (t.defined()) leaves.push_back(t);
  return leaves;
}

void check_close(const at::Tensor& found, const at::Tensor& exact) {
  REQUIRE(found.defined());
  CHECK(torch::allclose(found.to(at::kDouble), exact, 1e-4, 1e-4));
}

}  // namespace

TEST_CASE("projections of one reading have the formula's values and gradients") {
  torch::manual_seed(0);
  for (const bool packed : {false, true})
    for (const auto& [name, reading] : readings()) {
      CAPTURE(name);
      CAPTURE(packed);
      const auto projections = six(packed);
      const auto leaves = leaves_of(reading.source, projections);
      Tensors exact_leaves;
      for (const auto& leaf : leaves)
        exact_leaves.push_back(leaf.detach().to(at::kDouble).requires_grad_());
      size_t next = reading.source.inputs.size();
      const auto x = reading.formula(
          {exact_leaves.begin(), exact_leaves.begin() + static_cast<int64_t>(next)});
      Tensors wanted, slopes;
      for (const auto& p : projections) {
        auto y = x.matmul(p.weight.rows(0, p.weight.out, at::kDouble).t());
        const auto bias = p.bias.defined() ? exact_leaves[next++] : at::Tensor();
        if (p.a.defined()) {
          y = y + p.scaling * x.matmul(exact_leaves[next].t()).matmul(exact_leaves[next + 1].t());
          next += 2;
        }
        if (p.gain.defined()) y = y * exact_leaves[next++];
        if (bias.defined()) y = y + bias;
        wanted.push_back(y);
        slopes.push_back(torch::randn(y.sizes()));
      }
      const auto found = budwood::ops::project(reading.source, projections);
      Tensors exact_slopes;
      for (const auto& slope : slopes) exact_slopes.push_back(slope.to(at::kDouble));
      for (size_t i = 0; i < found.size(); ++i) check_close(found[i], wanted[i]);
      const auto grads = torch::autograd::grad(found, leaves, slopes, /*retain_graph=*/true);
      const auto again = torch::autograd::grad(found, leaves, slopes);
      const auto exact = torch::autograd::grad(wanted, exact_leaves, exact_slopes);
      for (size_t i = 0; i < grads.size(); ++i) {
        CAPTURE(i);
        check_close(grads[i], exact[i]);
        CHECK(torch::equal(grads[i], again[i]));
      }
    }
}

TEST_CASE("gradients are taken only where they are wanted, and of results that were used") {
  torch::manual_seed(0);
  const auto x = random({6, 12}, false);
  const auto projections = six(false);
  const auto all = budwood::ops::project(Source::plain(x), projections);
  // The last result is not used: its factors get zeros, or nothing.
  const auto grads = torch::autograd::grad({all[0].sum()}, {projections[0].a, projections[2].b}, {},
                                           /*retain_graph=*/false, false, /*allow_unused=*/true);
  CHECK(grads[0].defined());
  CHECK((!grads[1].defined() || grads[1].abs().max().item<float>() == 0));
  CHECK_FALSE(all[1].grad_fn() == nullptr);
}

TEST_CASE("no rows are ordinary, and what does not fit is refused") {
  const auto projections = six(false);
  const auto none = random({0, 12});
  const auto results = budwood::ops::project(Source::plain(none), projections);
  CHECK(results[0].sizes() == at::IntArrayRef({0, 7}));
  results[0].sum().backward();
  CHECK(none.grad().sizes() == none.sizes());
  CHECK_THROWS_WITH_AS(budwood::ops::project(Source::plain(random({2, 11})), projections),
                       doctest::Contains("last dimension is 12"), c10::Error);
  auto trained = projections;
  trained[0].weight = Weight::dense(random({7, 12}));
  CHECK_THROWS_WITH_AS(budwood::ops::project(Source::plain(none), trained),
                       doctest::Contains("frozen"), c10::Error);
  auto short_gain = projections;
  short_gain[4].gain = random({4});
  CHECK_THROWS_WITH_AS(budwood::ops::project(Source::plain(none), short_gain),
                       doctest::Contains("a gain is [5]"), c10::Error);
  auto alone = projections;
  alone[0].b = at::Tensor();
  CHECK_THROWS_WITH_AS(budwood::ops::project(Source::plain(none), alone),
                       doctest::Contains("come together"), c10::Error);
}
