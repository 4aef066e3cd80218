#include <doctest/doctest.h>
#include <torch/torch.h>

#include <budwood/peft/inject.h>
#include <budwood/peft/methods/lora.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/peft/slot.h>
#include <budwood/quant/error.h>
#include <budwood/quant/quantize.h>

using namespace budwood;

namespace {

std::shared_ptr<LoraConfig> config_of(int64_t rank, double alpha) {
  auto config = std::make_shared<LoraConfig>();
  config->r = rank;
  config->lora_alpha = alpha;
  config->target_modules = std::vector<std::string>{"proj"};
  return config;
}

struct OneSlot : torch::nn::Module {
  LinearSlot proj{nullptr};
  explicit OneSlot(at::ScalarType dtype = at::kFloat, bool bias = true, bool transposed = false) {
    torch::manual_seed(1);
    auto w = torch::randn({5, 3}).to(dtype);
    auto weight =
        transposed ? quant::Weight::dense_transposed(w.t().contiguous()) : quant::Weight::dense(w);
    proj = register_module(
        "proj", LinearSlot(weight, bias ? torch::randn({5}).to(dtype) : torch::Tensor()));
  }
};

void randomise(torch::nn::Module& model) {
  torch::NoGradGuard no_grad;
  for (auto& [path, p] : trainable_parameters(model)) p.normal_();
}

}  // namespace

TEST_CASE("the golden numbers of LoRA and rsLoRA") {
  torch::nn::Module model;
  const auto w = torch::tensor({{1.f, 2.f, 3.f}, {4.f, 5.f, 6.f}});
  LinearSlot slot = model.register_module(
      "proj", LinearSlot(quant::Weight::dense(w), torch::tensor({0.5f, -0.5f})));
  for (const bool stabilised : {false, true}) {
    auto config = config_of(2, 3);
    config->use_rslora = stabilised;
    inject(model, config);
    const auto trained = trainable_parameters(model);
    torch::NoGradGuard no_grad;
    trained[0].second.copy_(torch::tensor({{1.f, 0.f, -1.f}, {0.5f, 0.5f, 0.f}}));
    trained[1].second.copy_(torch::tensor({{1.f, 2.f}, {-1.f, 0.5f}}));
    const auto y = slot(torch::tensor({1.f, 1.f, 2.f}));
    const auto wanted =
        stabilised ? torch::tensor({11.6213207f, 23.6819801f}) : torch::tensor({11.f, 22.75f});
    CHECK(torch::allclose(y, wanted, 1e-6, 1e-6));
    merge(model);
    if (!stabilised)
      CHECK(torch::equal(slot->weight().parts[0],
                         torch::tensor({{4.f, 3.5f, 1.5f}, {2.875f, 5.375f, 7.5f}})));
    CHECK(torch::allclose(slot(torch::tensor({1.f, 1.f, 2.f})), wanted, 1e-6, 1e-6));
    unmerge(model);
    CHECK(torch::equal(slot->weight().parts[0], w));
    detach(model, "default");
  }
}

TEST_CASE("a fresh adapter leaves the output bit-equal, and a disabled one always does") {
  OneSlot model;
  const auto x = torch::randn({4, 3}), base = model.proj(x);
  inject(model, config_of(2, 4));
  CHECK(torch::equal(model.proj(x), base));
  randomise(model);
  CHECK_FALSE(torch::equal(model.proj(x), base));
  {
    DisableAdapters off(model);
    CHECK(torch::equal(model.proj(x), base));
  }
  CHECK_FALSE(torch::equal(model.proj(x), base));
}

TEST_CASE("several adapters add up, and the active set chooses among them") {
  OneSlot model;
  const auto x = torch::randn({4, 3}), base = model.proj(x);
  inject(model, config_of(2, 4), "a", 1);
  randomise(model);
  inject(model, config_of(1, 4), "b", 2);
  randomise(model);
  set_active(model, {"a"});
  const auto a = model.proj(x) - base;
  set_active(model, {"b"});
  const auto b = model.proj(x) - base;
  set_active(model, {"a", "b"});
  CHECK(torch::allclose(model.proj(x), base + a + b, 1e-5, 1e-5));
  CHECK(trainable_parameters(model).size() == 4);
  set_active(model, {"b"});
  CHECK(trainable_parameters(model).size() == 2);
  CHECK_THROWS_WITH_AS(set_active(model, {"c"}), doctest::Contains("no adapter named 'c'"), Error);
  merge(model, {"a", "b"});
  CHECK(torch::allclose(model.proj(x), base + a + b, 1e-5, 1e-5));
  CHECK_THROWS_AS(merge(model, {"a"}), Error);
  CHECK_THROWS_AS(detach(model, "a"), Error);
  unmerge(model);
}

TEST_CASE("a thousand merges and unmerges leave a bf16 weight bit-identical") {
  for (const bool transposed : {false, true}) {
    OneSlot model(at::kBFloat16, true, transposed);
    const auto before = model.proj->weight().rows(0, 5, at::kBFloat16).clone();
    inject(model, config_of(2, 4));
    randomise(model);
    for (int i = 0; i < 1000; ++i) {
      merge(model);
      unmerge(model);
    }
    CHECK(torch::equal(model.proj->weight().rows(0, 5, at::kBFloat16), before));
  }
}

TEST_CASE("a merge that is not finite is refused and changes nothing") {
  OneSlot model(at::kHalf);
  const auto before = model.proj->weight().parts[0].clone();
  inject(model, config_of(2, 4));
  {
    torch::NoGradGuard no_grad;
    for (auto& [path, p] : trainable_parameters(model)) p.fill_(1e4);
  }
  CHECK_THROWS_WITH_AS(merge(model), doctest::Contains("not finite"), Error);
  CHECK(torch::equal(model.proj->weight().parts[0], before));
  CHECK(model.proj->merged().empty());
}

TEST_CASE("only adapters require grad, and biases when asked for") {
  for (const std::string bias : {"none", "all", "lora_only"}) {
    OneSlot model;
    auto config = config_of(2, 4);
    config->bias = bias;
    inject(model, config);
    CHECK(trainable_parameters(model).size() == (bias == "none" ? 2 : 3));
    CHECK_FALSE(model.proj->weight().parts[0].requires_grad());
  }
}

TEST_CASE("dropout acts on the adapter's input in training only") {
  OneSlot model;
  auto config = config_of(2, 4);
  config->lora_dropout = 0.5;
  inject(model, config);
  randomise(model);
  const auto x = torch::randn({64, 3});
  model.eval();
  CHECK(torch::equal(model.proj(x), model.proj(x)));
  const auto wanted = model.proj(x);
  model.train();
  CHECK_FALSE(torch::equal(model.proj(x), model.proj(x)));
  auto mean = torch::zeros_like(wanted);
  for (int i = 0; i < 2000; ++i) mean += model.proj(x).detach() / 2000;
  CHECK((mean - wanted).abs().max().item<float>() < 1.0);
  CHECK((mean - wanted).norm().item<float>() / wanted.norm().item<float>() < 0.05);
}

TEST_CASE("every place draws from a stream of its own") {
  OneSlot first, second;
  inject(first, config_of(2, 4), "default", 7);
  inject(second, config_of(2, 4), "default", 7);
  CHECK(
      torch::equal(trainable_parameters(first)[0].second, trainable_parameters(second)[0].second));
  OneSlot third;
  inject(third, config_of(2, 4), "default", 8);
  CHECK_FALSE(
      torch::equal(trainable_parameters(first)[0].second, trainable_parameters(third)[0].second));
}

TEST_CASE("casting the module casts the base and leaves adapters usable") {
  OneSlot model;
  inject(model, config_of(2, 4));
  randomise(model);
  const auto x = torch::randn({4, 3});
  const auto wanted = model.proj(x);
  model.to(at::kDouble);
  CHECK((model.proj->weight().dtype() == at::kDouble));
  CHECK(torch::allclose(model.proj(x.to(at::kDouble)).to(at::kFloat), wanted, 1e-5, 1e-5));
}

TEST_CASE("casting a module leaves packed weights as they are and moves everything around them") {
  torch::manual_seed(0);
  const auto plain = torch::randn({12, 64});
  for (const char* format : {"nf4", "int8", "int4"}) {
    const auto weight = quant::quantize(plain, {.format = format});
    const auto values = weight.rows(0, 12, at::kFloat);
    torch::nn::Module model;
    LinearSlot slot = model.register_module("proj", LinearSlot(weight, torch::randn({12})));
    EmbeddingSlot table = model.register_module("table", EmbeddingSlot(weight));
    inject(model, config_of(2, 4));
    for (const auto type : {at::kBFloat16, at::kFloat}) {
      model.to(type);
      CHECK((slot->bias().scalar_type() == type));
      CHECK(torch::equal(slot->weight().rows(0, 12, at::kFloat), values));
      CHECK(torch::equal(table->weight().rows(0, 12, at::kFloat), values));
      CHECK((slot(torch::randn({3, 64}).to(type)).scalar_type() == type));
    }
    model.to(at::Device(at::kCPU), at::kDouble);
    CHECK(torch::equal(slot->weight().rows(0, 12, at::kFloat), values));
    CHECK((slot->bias().scalar_type() == at::kDouble));
  }
}

TEST_CASE("merging into a packed weight gives a dense fp32 one, and unmerging the codes again") {
  torch::manual_seed(0);
  const auto weight = quant::quantize(torch::randn({12, 64}), {.format = "nf4"});
  torch::nn::Module model;
  LinearSlot slot = model.register_module("proj", LinearSlot(weight));
  inject(model, config_of(2, 4));
  randomise(model);
  const auto x = torch::randn({9, 64});
  const auto wanted = slot(x);
  merge(model);
  CHECK((slot->weight().format == quant::Format::dense));
  CHECK((slot->weight().dtype() == at::kFloat));
  CHECK(torch::allclose(slot(x), wanted, 1e-5, 1e-5));
  CHECK(model.named_parameters().contains("proj.weight"));
  CHECK_FALSE(model.named_parameters().contains("proj.weight_1"));
  unmerge(model);
  CHECK(slot->weight().parts[0].is_same(weight.parts[0]));
  CHECK(torch::equal(slot(x), wanted));
}
