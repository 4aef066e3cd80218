#include <budwood/peft/scoped_weight_delta.h>
#include <budwood/quant/error.h>
#include <doctest/doctest.h>
#include <torch/torch.h>

using namespace budwood;

namespace {

torch::nn::Sequential model_of() {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Conv2d(torch::nn::Conv2dOptions(3, 6, 3).padding(1)),
                              torch::nn::Conv2d(6, 4, 1), torch::nn::Flatten(),
                              torch::nn::Linear(4 * 16, 5));
  for (auto& p : model->parameters()) p.set_requires_grad(false);
  return model;
}

struct Factors {
  at::Tensor a, b;
  Factors(std::vector<int64_t> in, std::vector<int64_t> out)
      : a(torch::randn(in) * 0.3), b(torch::randn(out) * 0.3) {
    a.requires_grad_();
    b.requires_grad_();
  }
};

}  // namespace

TEST_CASE("LoRA on a model without slots: results and gradients of the changed weights") {
  auto model = model_of();
  torch::manual_seed(1);
  Factors first({2, 3, 3, 3}, {6, 2, 1, 1}), last({3, 64}, {5, 3});
  const auto x = torch::randn({2, 3, 4, 4});
  const auto before = model->forward(x);
  auto conv = model[0]->as<torch::nn::Conv2d>(), other = model[1]->as<torch::nn::Conv2d>();
  auto linear = model[3]->as<torch::nn::Linear>();
  const auto w0 = conv->weight, w3 = linear->weight;

  // The same by hand: a convolution to r channels, then one of kernel 1.
  auto y = model[0]->as<torch::nn::Conv2d>()->forward(x) +
           0.5 * torch::conv2d(torch::conv2d(x, first.a, {}, 1, 1), first.b);
  y = other->forward(y).flatten(1);
  const auto wanted = linear->forward(y) + 2.0 * torch::linear(torch::linear(y, last.a), last.b);
  const auto gradients =
      torch::autograd::grad({wanted.square().sum()}, {first.a, first.b, last.a, last.b});
  {
    ScopedWeightDelta adapted(*model, {{"0", first.a, first.b, 0.5}, {"3", last.a, last.b, 2.0}});
    const auto found = model->forward(x);
    CHECK(torch::allclose(found, wanted, 1e-4, 1e-5));
    found.square().sum().backward();
    CHECK(model->named_parameters()["0.weight"].is_same(w0));
  }
  const at::Tensor leaves[] = {first.a, first.b, last.a, last.b};
  for (size_t i = 0; i < 4; ++i) CHECK(torch::allclose(leaves[i].grad(), gradients[i], 1e-3, 1e-4));
  CHECK(conv->weight.is_same(w0));
  CHECK(linear->weight.is_same(w3));
  CHECK(torch::equal(model->forward(x), before));
}

TEST_CASE("a table of a model without slots") {
  torch::manual_seed(2);
  torch::nn::Embedding table(7, 4);
  torch::nn::Sequential model(table);
  Factors factors({2, 4}, {7, 2});
  const auto ids = torch::tensor({3, 0, 3});
  const auto wanted = table->weight + factors.b.mm(factors.a);
  ScopedWeightDelta adapted(*model, {{"0", factors.a, factors.b}});
  CHECK(torch::allclose(model->forward(ids), wanted.index_select(0, ids)));
}

TEST_CASE("what is no such layer is named, and nothing is changed") {
  auto model = model_of();
  Factors fits({2, 64}, {5, 2}), narrow({2, 60}, {5, 2});
  const auto weight = model[3]->as<torch::nn::Linear>()->weight;
  const auto make = [&](const std::vector<WeightDelta>& deltas) {
    ScopedWeightDelta adapted(*model, deltas);
  };
  CHECK_THROWS_WITH_AS(make({{"3", fits.a, fits.b}, {"9", fits.a, fits.b}}),
                       doctest::Contains("'9' is no module of the model"), Error);
  CHECK_THROWS_WITH_AS(make({{"2", fits.a, fits.b}}), doctest::Contains("Flatten"), Error);
  CHECK_THROWS_WITH_AS(make({{"3", narrow.a, narrow.b}}),
                       doctest::Contains("[2, 60] and [5, 2] do not make a weight of [5, 64]"),
                       Error);
  CHECK_THROWS_WITH_AS(make({{"3", fits.a, fits.b}, {"3", fits.a, fits.b}}),
                       doctest::Contains("twice"), Error);
  CHECK(model[3]->as<torch::nn::Linear>()->weight.is_same(weight));
  torch::nn::Sequential grouped(torch::nn::Conv2d(torch::nn::Conv2dOptions(4, 4, 3).groups(2)));
  ScopedWeightDelta none(*grouped, {});
  CHECK_THROWS_WITH_AS(
      ScopedWeightDelta(*grouped, {{"0", torch::randn({2, 4, 3, 3}), torch::randn({4, 2})}}),
      doctest::Contains("groups=1"), Error);
}
