#include <budwood/peft/models/blocks.h>

#include <torch/torch.h>

#include <budwood/peft/models/llama.h>
#include <budwood/quant/error.h>
#include <memory>

// Behind torch, whose logging defines CHECK too.
#include <doctest/doctest.h>

using namespace budwood;
using namespace budwood::models;

namespace {

class RandomSource final : public WeightSource {
 public:
  explicit RandomSource(at::ScalarType dtype) : dtype_(dtype) {}
  bool has(const std::string&) const override { return true; }
  quant::Weight matrix(const std::string&, int64_t out, int64_t in) override {
    return quant::Weight::dense((torch::randn({out, in}) * 0.3).to(dtype_));
  }
  at::Tensor vector(const std::string&, int64_t size) override {
    return (torch::rand({size}) + 0.5).to(dtype_);
  }
  at::ScalarType dtype() const override { return dtype_; }
  std::vector<std::string> unused() const override { return {}; }

 private:
  at::ScalarType dtype_;
};

std::shared_ptr<LlamaForCausalLM> tiny(int64_t kv_heads, at::ScalarType dtype = at::kFloat) {
  torch::manual_seed(0);
  ModelConfig config;
  config.model_type = "llama";
  config.vocab_size = 31;
  config.hidden_size = 24;
  config.intermediate_size = 40;
  config.num_hidden_layers = 2;
  config.num_attention_heads = 4;
  config.num_key_value_heads = kv_heads;
  config.head_dim = 6;
  config.max_position_embeddings = 32;
  config.attention_bias = config.attention_out_bias = config.mlp_bias = true;
  RandomSource source(dtype);
  return std::make_shared<LlamaForCausalLM>(config, source);
}

TokenBatch sequences() {
  return TokenBatch::from_sequences({{3, 14, 15, 9, 26, 5}, {8, 9, 7}});
}

double distance(const at::Tensor& found, const at::Tensor& wanted) {
  return ((found - wanted).norm() / wanted.norm()).item<double>();
}

}  // namespace

TEST_CASE("a model's blocks, one after the other, are the model") {
  torch::NoGradGuard no_grad;
  auto model = tiny(2);
  const auto batch = sequences();
  auto x = model->embed(batch);
  std::vector<std::string> paths;
  for (const auto& block : model->blocks()) {
    x = block.forward(x, batch);
    for (const auto& group : block.groups)
      for (const auto& projection : group.projections) paths.push_back(projection.path);
  }
  CHECK(torch::equal(x, model->logits(model->hidden(batch))));
  CHECK(paths.size() == 15);
  CHECK(paths[0] == "model.layers.0.self_attn.q_proj");
  CHECK(paths[14] == "lm_head");
  for (const auto& path : paths) CHECK(model->named_modules().contains(path));
}

TEST_CASE("a group's output is what the block makes of its input") {
  torch::NoGradGuard no_grad;
  auto model = tiny(2);
  const auto batch = sequences();
  const auto x = model->embed(batch);
  const auto block = model->blocks()[0];
  std::vector<at::Tensor> inputs(block.groups.size());
  for (size_t g = 0; g < inputs.size(); ++g)
    LinearSlot(block.groups[g].projections[0].slot)
        ->set_observer([&inputs, g](const at::Tensor& seen) { inputs[g] = seen; });
  const auto y = block.forward(x, batch);
  const auto attended = block.groups[0].output(inputs[0], batch);
  CHECK(torch::equal(attended, block.groups[1].output(inputs[1], batch)));
  const auto fed = block.groups[2].output(inputs[2], batch);
  CHECK(torch::equal(fed, block.groups[3].output(inputs[3], batch)));
  CHECK(distance(x + attended + fed, y) < 1e-6);
}

TEST_CASE("a scale moves into norms and projections without a change of the model") {
  torch::NoGradGuard no_grad;
  for (const int64_t kv_heads : {4, 2}) {
    auto model = tiny(kv_heads);
    const auto batch = sequences();
    const auto wanted = model->logits(model->hidden(batch));
    int moved = 0;
    for (const auto& block : model->blocks())
      for (const auto& group : block.groups) {
        auto slot = group.projections[0].slot;
        const auto scale = torch::exp(torch::randn({slot->in_features()}));
        if (!can_move_scale(group)) {
          CHECK(kv_heads != 4);
          CHECK_THROWS_AS(move_scale(group, scale), Error);
          continue;
        }
        const auto before = slot->weight().rows(0, slot->out_features(), at::kFloat).clone();
        const auto used = move_scale(group, scale);
        CHECK(distance(used, scale) < 1e-6);
        CHECK(
            torch::equal(slot->weight().rows(0, slot->out_features(), at::kFloat), before * used));
        ++moved;
      }
    CHECK(moved == (kv_heads == 4 ? 9 : 7));
    CHECK(distance(model->logits(model->hidden(batch)), wanted) < 1e-6);
  }
}

TEST_CASE("in bfloat16 the scale becomes one that the norm can hold") {
  torch::NoGradGuard no_grad;
  auto model = tiny(2, at::kBFloat16);
  const auto group = model->blocks()[0].groups[0];
  const auto before = group.norm.to(at::kFloat);
  const auto scale = torch::exp(torch::randn({24}));
  const auto used = move_scale(group, scale);
  CHECK((group.norm.scalar_type() == at::kBFloat16));
  CHECK(distance(group.norm.to(at::kFloat) * used, before) < 1e-7);
  CHECK(distance(used, scale) < 4e-3);
}

TEST_CASE("a model without blocks says so") {
  class Other final : public CausalLM {
   public:
    Other()
        : CausalLM([] {
            ModelConfig config;
            config.model_type = "other";
            return config;
          }()) {}
    at::Tensor hidden(const TokenBatch&, KvCache*) override { return {}; }
    at::Tensor logits(const at::Tensor&) override { return {}; }
    std::vector<at::Tensor> head_parameters() const override { return {}; }
    at::ScalarType dtype() const override { return at::kFloat; }
  } model;
  CHECK_THROWS_WITH_AS(model.blocks(), doctest::Contains("'other'"), Error);
}
