#include <doctest/doctest.h>
#include <torch/torch.h>

#include <budwood/peft/inject.h>
#include <budwood/peft/methods/adalora.h>
#include <budwood/peft/methods/adalora_config.h>
#include <budwood/peft/methods/bottleneck_config.h>
#include <budwood/peft/methods/dylora_config.h>
#include <budwood/peft/methods/ia3_config.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/peft/methods/prompt_config.h>
#include <budwood/peft/methods/reft_config.h>
#include <budwood/peft/methods/vera_config.h>
#include <budwood/peft/slot.h>
#include <budwood/quant/error.h>
#include <budwood/quant/quantize.h>

using namespace budwood;
using List = std::vector<std::string>;

namespace {

// Two projections, a table, an attention and the output of a block, as a model has them.
at::Tensor run(const LinearSlot& slot, const at::Tensor& x) {
  return slot.ptr()->forward(x);
}

struct Places : torch::nn::Module {
  LinearSlot up{nullptr}, down{nullptr};
  EmbeddingSlot table{nullptr};
  AttentionSlot attention{nullptr};
  BlockSlot block{nullptr};
  InputSlot input{nullptr};

  explicit Places(bool packed = false) {
    torch::manual_seed(1);
    const auto linear = [&](int64_t out, int64_t in) {
      const auto w = torch::randn({out, in});
      return LinearSlot(packed ? quant::quantize(w, {.block_size = 32}) : quant::Weight::dense(w),
                        torch::randn({out}));
    };
    up = register_module("up", linear(64, 32));
    down = register_module("down", linear(32, 64));
    table = register_module("table", EmbeddingSlot(quant::Weight::dense(torch::randn({11, 32}))));
    attention = register_module("adapters", AttentionSlot(0, 4, 2, 8, 32));
    block = register_module("output_adapters", BlockSlot("feed_forward", 0, 32));
    input = register_module("input", InputSlot(11, 32));
  }
  at::Tensor forward(const at::Tensor& x) { return run(down, torch::silu(run(up, x))); }
};

void randomise(torch::nn::Module& model, double centre = 0.0) {
  torch::NoGradGuard no_grad;
  torch::manual_seed(4);
  for (auto& [path, p] : trainable_parameters(model)) p.normal_(centre, 0.3);
}

at::Tensor dense(const LinearSlot& slot) {
  return slot->weight().rows(0, slot->weight().out, at::kDouble);
}

// Gradients of a scalar of f against central differences, at a few entries of each tensor.
void check_gradients(torch::nn::Module& model, const std::function<at::Tensor()>& f) {
  const auto trained = trainable_parameters(model);
  REQUIRE_FALSE(trained.empty());
  for (auto& [path, p] : trained) p.mutable_grad() = at::Tensor();
  f().backward();
  torch::NoGradGuard no_grad;
  for (auto& [path, p] : trained) {
    CAPTURE(path);
    REQUIRE(p.grad().defined());
    auto flat = p.view({-1});
    for (int64_t i = 0; i < flat.numel(); i += std::max<int64_t>(1, flat.numel() / 3)) {
      const double kept = flat[i].item<double>(), h = 1e-2;
      flat[i] = kept + h;
      const double above = f().item<double>();
      flat[i] = kept - h;
      const double below = f().item<double>();
      flat[i] = kept;
      const double wanted = (above - below) / (2 * h), got = p.grad().view({-1})[i].item<double>();
      CHECK(std::abs(wanted - got) < 2e-2 * std::max(1.0, std::abs(wanted)));
    }
  }
}

// Row norms are constants for DoRA's gradients, so these are the formula's and no differences.
void check_dora_gradients(Places& model, const LoraConfig& config, const at::Tensor& x) {
  const auto up = trainable_parameters(model);
  const auto a = up[0].second.detach().to(at::kDouble).requires_grad_();
  const auto b = up[1].second.detach().to(at::kDouble).requires_grad_();
  const auto m = up[2].second.detach().to(at::kDouble).requires_grad_();
  const auto w = dense(model.up), wide = x.to(at::kDouble);
  const double s = config.lora_alpha / 4;
  const auto n = (w + s * b.mm(a)).norm(2, {1}).detach();
  const auto formula =
      m / n * (wide.mm(w.t()) + s * wide.mm(a.t()).mm(b.t())) + model.up->bias().to(at::kDouble);
  formula.square().sum().backward();
  run(model.up, x).square().sum().backward();
  size_t i = 0;
  for (const auto& wanted : {a, b, m}) {
    const auto got = up[i++].second.grad().to(at::kDouble);
    CHECK((got - wanted.grad()).norm().item<double>() < 1e-4 * wanted.grad().norm().item<double>());
  }
}

}  // namespace

TEST_CASE("IA3 scales outputs, and inputs of feed-forward places") {
  Places model;
  auto config = std::make_shared<IA3Config>();
  config->target_modules = List{"up", "down"};
  config->feedforward_modules = List{"down"};
  const auto x = torch::randn({5, 32});
  const auto base = model.forward(x);
  inject(model, config);
  CHECK(torch::equal(model.forward(x), base));
  randomise(model, 1.0);
  const auto trained = trainable_parameters(model);
  const auto l_up = trained[0].second.flatten(), l_down = trained[1].second.flatten();
  const auto h =
      torch::silu(l_up * (torch::linear(x, model.up->weight().parts[0]) + model.up->bias()));
  const auto wanted = torch::linear(l_down * h, model.down->weight().parts[0], model.down->bias());
  CHECK(torch::allclose(model.forward(x), wanted, 1e-4, 1e-4));
  check_gradients(model, [&] { return model.forward(x).square().mean(); });
  const auto y = model.forward(x);
  merge(model);
  CHECK(torch::allclose(model.forward(x), y, 1e-4, 1e-4));
  unmerge(model);
  CHECK(torch::equal(model.forward(x), y));
}

TEST_CASE("DoRA has the row norms it learned, also where W and its change cancel") {
  for (const bool packed : {false, true}) {
    CAPTURE(packed);
    Places model(packed);
    auto config = std::make_shared<LoraConfig>();
    config->target_modules = List{"up"};
    config->r = 4;
    config->use_dora = true;
    const auto x = torch::randn({5, 32});
    const auto base = run(model.up, x);
    inject(model, config);
    CHECK(torch::allclose(run(model.up, x), base, 1e-5, 1e-5));
    randomise(model, 0.5);
    check_dora_gradients(model, *config, x);
    const auto y = run(model.up, x);
    merge(model);
    CHECK(torch::allclose(run(model.up, x), y, 1e-4, 1e-4));
    unmerge(model);
    const auto trained = trainable_parameters(model);
    const auto a = trained[0].second, b = trained[1].second, m = trained[2].second;
    // A change that takes row 0 of W away but for a thousandth.
    torch::NoGradGuard no_grad;
    a.zero_();
    a[0].copy_(dense(model.up)[0]);
    b.zero_();
    b[0][0] = -0.999 / (8.0 / 4.0);
    const auto v = dense(model.up) + 2.0 * b.to(at::kDouble).mm(a.to(at::kDouble));
    const auto wanted = m.to(at::kDouble).unsqueeze(1) * v / v.norm(2, 1, true);
    const auto z = torch::linear(x.to(at::kDouble), wanted) + model.up->bias();
    const auto found = run(model.up, x).to(at::kDouble);
    CHECK(torch::allclose(found.narrow(1, 1, 63), z.narrow(1, 1, 63), 1e-4, 1e-4));
    CHECK(torch::allclose(found.narrow(1, 0, 1), z.narrow(1, 0, 1), 1e-2, 1e-2));
  }
}

TEST_CASE("PiSSA and OLoRA start as the base, and what is learned is what differs from the start") {
  for (const std::string init : {"pissa", "pissa_niter_4", "olora"}) {
    CAPTURE(init);
    Places model;
    auto config = std::make_shared<LoraConfig>();
    config->target_modules = List{"up", "down"};
    config->r = 4;
    config->lora_alpha = 2;
    config->init_lora_weights = init;
    const auto x = torch::randn({5, 32});
    const auto base = model.forward(x);
    const auto w = dense(model.up);
    inject(model, config);
    CHECK(torch::allclose(model.forward(x), base, 1e-4, 1e-4));
    const auto trained = trainable_parameters(model);
    const auto a0 = trained[0].second.clone(), b0 = trained[1].second.clone();
    if (init == "pissa") {
      const auto left = w - 0.5 * b0.to(at::kDouble).mm(a0.to(at::kDouble));
      const auto s = std::get<1>(at::linalg_svd(w, false));
      CHECK(std::abs(at::linalg_norm(left, 2).item<double>() - s[4].item<double>()) < 1e-4);
    }
    randomise(model);
    const auto wanted = w + 0.5 * (trained[1].second.mm(trained[0].second) - b0.mm(a0));
    CHECK(torch::allclose(run(model.up, x),
                          torch::linear(x, wanted.to(at::kFloat), model.up->bias()), 1e-4, 1e-4));
    merge(model);
    CHECK(torch::allclose(dense(model.up), wanted.to(at::kDouble), 1e-5, 1e-5));
    unmerge(model);
    CHECK(torch::equal(dense(model.up), w));
  }
}

TEST_CASE("VeRA draws the numbers of HF PEFT from its key") {
  Places model;
  auto config = std::make_shared<VeraConfig>();
  config->target_modules = List{"up", "down"};
  config->r = 4;
  inject(model, config);
  const auto tensors = adapter_tensors(model, "default");
  for (const auto& [key, tensor] : tensors)
    if (key == "base_model.vera_A") {
      CHECK(tensor.sizes() == at::IntArrayRef({4, 64}));
      // The golden numbers are of a width of 96: the draw is the same, the bound another.
      CHECK(tensor[0][0].item<double>() == doctest::Approx(-0.0018717051 * std::sqrt(96.0 / 64.0)));
    }
  const auto x = torch::randn({5, 32});
  randomise(model);
  check_gradients(model, [&] { return model.forward(x).square().mean(); });
}

TEST_CASE("DyLoRA works at every rank, and rows above the drawn one learn nothing") {
  Places model;
  auto config = std::make_shared<DyLoraConfig>();
  config->target_modules = List{"up"};
  config->r = 6;
  inject(model, config);
  randomise(model);
  model.train();
  const auto x = torch::randn({5, 32});
  bool smaller = false;
  for (int64_t step = 0; step < 8; ++step) {
    before_step(model, step);
    for (auto& [path, p] : trainable_parameters(model)) p.mutable_grad() = at::Tensor();
    run(model.up, x).sum().backward();
    const auto grad = trainable_parameters(model)[0].second.grad();
    const auto used = grad.abs().sum(1).gt(0).sum().item<int64_t>();
    CHECK(used >= 1);
    smaller |= used < 6;
    CHECK(grad.narrow(0, used, 6 - used).abs().sum().item<double>() == 0.0);
  }
  CHECK(smaller);
}

TEST_CASE("AdaLoRA's budget falls by the schedule and masks what matters least") {
  Places model;
  auto config = std::make_shared<AdaLoraConfig>();
  config->target_modules = List{"up", "down"};
  config->init_r = 4;
  config->target_r = 2;
  config->tinit = 1;
  config->tfinal = 2;
  config->total_step = 8;
  CHECK(adalora_budget(*config, 2, 1) == 8);
  CHECK(adalora_budget(*config, 2, 6) == 4);
  CHECK(adalora_budget(*config, 2, 3) == static_cast<int64_t>(4 + 4 * std::pow(1 - 2.0 / 5.0, 3)));
  inject(model, config);
  randomise(model);
  const auto x = torch::randn({5, 32});
  for (int64_t step = 0; step < 8; ++step) {
    for (auto& [path, p] : trainable_parameters(model)) p.mutable_grad() = at::Tensor();
    (model.forward(x).square().mean() + penalty(model)).backward();
    after_step(model, step);
  }
  int64_t left = 0;
  for (const auto& [key, tensor] : adapter_tensors(model, "default"))
    if (key.ends_with("lora_E")) left += tensor.size(0);
  CHECK(left == 4);
  const auto saved = std::static_pointer_cast<AdaLoraConfig>(adapter_config(model, "default"));
  CHECK(saved->kept_by_path().size() == 2);
}

TEST_CASE("the bottlenecks of AdapterHub's golden numbers") {
  const auto x = torch::tensor({{1.f, 2.f}}), h = torch::tensor({{3.f, -1.f}});
  struct Golden {
    std::shared_ptr<BottleneckConfig> config;
    std::vector<float> wanted;
  };
  const auto pfeiffer = std::make_shared<BottleneckConfig>();
  const auto houlsby = std::make_shared<BottleneckConfig>(BottleneckConfig::houlsby());
  houlsby->non_linearity = "relu";
  const auto parallel = std::make_shared<ParallelAdapterConfig>();
  for (const auto& [config, wanted] :
       {Golden{pfeiffer, {6.6f, -2.55f}}, Golden{houlsby, {9.6f, -7.05f}},
        Golden{parallel, {4.4f, 1.8f}}}) {
    torch::nn::Module model;
    BlockSlot block = model.register_module("output_adapters", BlockSlot("feed_forward", 0, 2));
    config->reduction_factor = 2;
    inject(model, config);
    torch::NoGradGuard no_grad;
    const auto p = trainable_parameters(model);
    p[0].second.copy_(torch::tensor({{0.5f, -1.f}}));
    p[1].second.fill_(0.25f);
    p[2].second.copy_(torch::tensor({{2.f}, {-3.f}}));
    p[3].second.copy_(torch::tensor({0.1f, 0.2f}));
    const auto out = block->forward(h, x, {}, {.cu = {0, 1}});
    CHECK(torch::allclose(out, torch::tensor(wanted).view({1, 2}), 1e-5, 1e-5));
  }
}

TEST_CASE("Compacter is the matrix of Kronecker products that it never forms") {
  torch::nn::Module model;
  BlockSlot block = model.register_module("output_adapters", BlockSlot("feed_forward", 0, 16));
  auto config = std::make_shared<CompacterConfig>();
  config->mh_adapter = false;
  config->reduction_factor = 2;
  config->phm_dim = 4;
  config->non_linearity = "linear";
  inject(model, config);
  randomise(model);
  std::map<std::string, at::Tensor> t;
  for (const auto& [key, tensor] : adapter_tensors(model, "default"))
    t[key.substr(key.find("output_adapters.") == std::string::npos
                     ? 0
                     : key.find("output_adapters.") + 16)] = tensor.detach();
  const auto rule = t.at("base_model.model.shared_parameters.phm_rule");
  const auto matrix = [&](const std::string& name) {
    at::Tensor sum;
    for (int64_t i = 0; i < 4; ++i) {
      const auto part = at::kron(rule[i], t.at(name + ".W_left")[i].mm(t.at(name + ".W_right")[i]));
      sum = sum.defined() ? sum + part : part;
    }
    return sum;
  };
  const auto h = torch::randn({5, 16}), x = torch::randn({5, 16});
  const auto f =
      (h.mm(matrix("adapter_down.0")) + t.at("adapter_down.0.b")).mm(matrix("adapter_up")) +
      t.at("adapter_up.b");
  const auto out = block->forward(h, x, {}, {.cu = {0, 5}});
  CHECK(torch::allclose(out, x + h + f, 1e-4, 1e-4));
  check_gradients(model, [&] { return block->forward(h, x, {}, {.cu = {0, 5}}).square().mean(); });
}

TEST_CASE("LoReFT keeps rows orthonormal and edits only the positions it was told") {
  torch::nn::Module model;
  BlockSlot block = model.register_module("output_adapters", BlockSlot("feed_forward", 0, 16));
  auto config = std::make_shared<ReftConfig>();
  config->prefix_positions = 2;
  config->suffix_positions = 1;
  inject(model, config);
  const auto stream = torch::randn({9, 16});
  const Sequences two{.cu = {0, 4, 9}, .prompt = {4, 4}};
  CHECK(torch::allclose(block->edit(stream, two), stream, 1e-5, 1e-5));
  randomise(model);
  const auto out = block->edit(stream, two);
  const auto changed = (out - stream).abs().sum(1).gt(1e-6);
  for (int64_t i = 0; i < 9; ++i) {
    CAPTURE(i);
    const bool wanted = i == 0 || i == 1 || i == 3 || i == 4 || i == 5 || i == 7;
    CHECK(changed[i].item<bool>() == wanted);
  }
  for (const auto& [key, tensor] : adapter_tensors(model, "default"))
    if (key.ends_with("rotate_layer"))
      CHECK(torch::allclose(tensor.t().mm(tensor), torch::eye(4), 1e-5, 1e-5));
  CHECK(torch::equal(block->edit(stream, {.cu = {0, 9}, .from_start = false}), stream));
  check_gradients(model, [&] { return block->edit(stream, two).square().mean(); });
}

TEST_CASE("virtual tokens stand where a placement says") {
  const auto rows = [](const std::string& text, int64_t tokens, std::vector<int64_t> prompt = {}) {
    const auto placement = Placement::parse(text, tokens);
    return insert_virtual_tokens({&placement}, {0, 3, 5}, prompt);
  };
  CHECK(rows("front", 2).rows == std::vector<int64_t>{-1, -2, 0, 1, 2, -1, -2, 3, 4});
  CHECK(rows("after_bos", 1).rows == std::vector<int64_t>{0, -1, 1, 2, 3, -1, 4});
  CHECK(rows("end", 1, {2, 1}).rows == std::vector<int64_t>{0, 1, -1, 2, 3, -1, 4});
  CHECK(rows("0:1,2:2", 3).rows == std::vector<int64_t>{-1, 0, 1, -2, -3, 2, -1, 3, 4, -2, -3});
  CHECK(rows("front", 2).cu == std::vector<int64_t>{0, 5, 9});
  CHECK_THROWS_WITH_AS(rows("3", 1), doctest::Contains("sequence 1 has 2 tokens"), Error);
  CHECK_THROWS_WITH_AS(Placement::parse("front:2,end:1", 4), doctest::Contains("hold 3"), Error);
  CHECK_THROWS_AS(Placement::parse("middle", 4), Error);
}

TEST_CASE("a method at a place it cannot attach to is refused, and the model stays as it was") {
  Places model;
  auto ia3 = std::make_shared<IA3Config>();
  ia3->target_modules = List{"table"};
  CHECK_THROWS_WITH_AS(inject(model, ia3), doctest::Contains("IA3 attaches to Linear slots"),
                       Error);
  auto prefix = std::make_shared<PrefixTuningConfig>();
  prefix->num_virtual_tokens = 3;
  prefix->num_layers = 2;
  CHECK_THROWS_WITH_AS(inject(model, prefix), doctest::Contains("this model has 1"), Error);
  auto dora = std::make_shared<LoraConfig>();
  dora->target_modules = List{"up"};
  dora->use_dora = true;
  inject(model, dora, "one");
  auto lora = std::make_shared<LoraConfig>();
  lora->target_modules = List{"up"};
  inject(model, lora, "two");
  CHECK_THROWS_WITH_AS(set_active(model, {"one", "two"}), doctest::Contains("beside another"),
                       Error);
  CHECK(model.up->adapter_names().size() == 2);
}

TEST_CASE("adapters of several kinds add up, each with its weight") {
  Places model;
  const auto x = torch::randn({5, 32});
  const auto base = run(model.up, x);
  for (const std::string name : {"a", "b"}) {
    auto config = std::make_shared<LoraConfig>();
    config->target_modules = List{"up"};
    inject(model, config, name);
  }
  set_active(model, {"a", "b"});
  randomise(model);
  const auto only = [&](const std::string& name) {
    set_active(model, {name});
    return run(model.up, x) - base;
  };
  const auto a = only("a"), b = only("b");
  set_active(model, {"a", "b"});
  CHECK(torch::allclose(run(model.up, x), base + a + b, 1e-4, 1e-4));
  model.up->adapter("b")->set_weight(0.5);
  CHECK(torch::allclose(run(model.up, x), base + a + 0.5 * b, 1e-4, 1e-4));
}

TEST_CASE("a token table takes each adapter at its weight, and a merge folds in the same") {
  for (const bool dora : {false, true}) {
    CAPTURE(dora);
    Places model;
    auto config = std::make_shared<LoraConfig>();
    config->target_modules = List{"table"};
    config->use_dora = dora;
    inject(model, config);
    randomise(model, 0.5);
    const auto ids = torch::arange(11);
    const auto base = model.table->weight().rows(0, 11, at::kFloat);
    const auto whole = model.table(ids, at::kFloat).detach();
    CHECK_FALSE(torch::allclose(whole, base));
    model.table->adapter("default")->set_weight(0.25);
    const auto wanted = base + 0.25 * (whole - base);
    CHECK(torch::allclose(model.table(ids, at::kFloat), wanted, 1e-5, 1e-5));
    merge(model);
    CHECK(torch::allclose(model.table->weight().rows(0, 11, at::kFloat), wanted, 1e-5, 1e-5));
    unmerge(model);
    CHECK(torch::equal(model.table->weight().rows(0, 11, at::kFloat), base));
  }
}

TEST_CASE("DoRA on a token table has the column norms it learned, also where they cancel") {
  Places model;
  auto config = std::make_shared<LoraConfig>();
  config->target_modules = List{"table"};
  config->use_dora = true;
  config->r = 2;
  inject(model, config);
  randomise(model, 0.5);
  const auto w = model.table->weight().rows(0, 11, at::kDouble);
  const auto state = model.table->adapter("default")->state();
  const auto a = state[0].second, b = state[1].second, m = state[2].second;
  REQUIRE(state[2].first == "lora_magnitude_vector");
  const double s = config->scaling("table");
  // A change that takes column 3 of W away but for a thousandth.
  torch::NoGradGuard no_grad;
  a[0].copy_(w.select(1, 3));
  b[3].zero_();
  b[3][0] = -0.999 / s;
  const auto v = w + s * a.t().to(at::kDouble).mm(b.t().to(at::kDouble));
  const auto wanted = v * (m.to(at::kDouble) / v.norm(2, 0));
  const auto found = model.table(torch::arange(11), at::kFloat).to(at::kDouble);
  const auto others = torch::cat({torch::arange(3), torch::arange(4, 32)});
  CHECK(torch::allclose(found.index_select(1, others), wanted.index_select(1, others), 1e-4, 1e-4));
  CHECK(torch::allclose(found.select(1, 3), wanted.select(1, 3), 1e-2, 1e-2));
}
