#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/method.h>
#include <budwood/peft/methods/prefix.h>
#include <budwood/quant/error.h>
#include <cmath>

namespace budwood {

KeyValues PrefixTable::of(int64_t layer, int64_t kv_heads, int64_t head_dim) const {
  const auto shaped = [&](const at::Tensor& rows) {
    return rows.view({rows.size(0), kv_heads, head_dim});
  };
  const int64_t first = 2 * layer * width;
  if (!projected)
    return {shaped(table.narrow(1, first, width)), shaped(table.narrow(1, first + width, width))};
  const auto hidden = at::tanh(at::linear(embedding, w1, b1));
  const auto both =
      at::linear(hidden, w2.narrow(0, first, 2 * width), b2.narrow(0, first, 2 * width));
  return {shaped(both.narrow(1, 0, width)), shaped(both.narrow(1, width, width))};
}

at::Tensor PrefixTable::value() const {
  if (!projected) return table;
  return at::linear(at::tanh(at::linear(embedding, w1, b1)), w2, b2);
}

Prefix::Prefix(std::shared_ptr<const PrefixTuningConfig> config,
               std::shared_ptr<PrefixTable> shared, int64_t index, const Place& place,
               at::Generator generator)
    : AttentionAdapter(config),
      shared_(std::move(shared)),
      index_(index),
      kv_heads_(place.kv_heads),
      head_dim_(place.head_dim) {
  if (own().gating != "none") {
    const int64_t factors = own().gating == "shared" ? 1 : 2;
    gate_weight_ = register_parameter(
        "gate_weight",
        at::empty({factors, place.hidden}, at::kFloat).normal_(0.0, 0.02, generator));
    gate_bias_ = register_parameter("gate_bias", at::zeros({factors}));
  }
  if (index_ > 0) return;
  auto& s = *shared_;
  s.table = register_parameter("prompt_embeddings", s.table, /*requires_grad=*/!s.projected);
  if (!s.projected) return;
  s.embedding = register_parameter("embedding", s.embedding);
  s.w1 = register_parameter("w1", s.w1);
  s.b1 = register_parameter("b1", s.b1);
  s.w2 = register_parameter("w2", s.w2);
  s.b2 = register_parameter("b2", s.b2);
}

const PrefixTuningConfig& Prefix::own() const {
  return static_cast<const PrefixTuningConfig&>(*config());
}

bool Prefix::moves_positions() const {
  return own().positions == "after";
}

at::Tensor Prefix::gate(const at::Tensor& hidden, const Sequences& sequences) const {
  const auto x = hidden.to(gate_weight_.scalar_type());
  const auto means =
      sequence_means(at::sigmoid(at::linear(x, gate_weight_, gate_bias_)), sequences);
  return means.expand({means.size(0), 2});
}

AdapterState Prefix::state() const {
  if (!gate_weight_.defined()) return {};
  return {{"prefix_gate.weight", gate_weight_}, {"prefix_gate.bias", gate_bias_}};
}

AdapterState Prefix::shared_state() const {
  if (index_ > 0) return {};
  const auto& s = *shared_;
  if (!s.projected) return {{"prompt_embeddings", s.table}};
  {
    at::NoGradGuard no_grad;
    auto table = s.table;
    table.copy_(s.value());
  }
  const std::string start = "budwood.prefix_encoder.";
  return {{"prompt_embeddings", s.table},       {start + "embedding.weight", s.embedding},
          {start + "transform.0.weight", s.w1}, {start + "transform.0.bias", s.b1},
          {start + "transform.2.weight", s.w2}, {start + "transform.2.bias", s.b2}};
}

void Prefix::loaded(const std::vector<std::string>& found) {
  // Without the MLP, as in HF PEFT's files, the table stands for itself.
  if (index_ == 0 && found.size() < 5) shared_->projected = false;
}

void Prefix::describe(AdapterConfig& saved, const std::string&) const {
  auto& config = dynamic_cast<PrefixTuningConfig&>(saved);
  config.token_dim = shared_->width;
  config.num_attention_heads = kv_heads_;
  config.num_layers = shared_->layers;
  if (!config.num_transformer_submodules) config.num_transformer_submodules = 1;
  config.encoder_hidden_size = shared_->w1.defined()
                                   ? shared_->w1.size(0)
                                   : config.encoder_hidden_size.value_or(shared_->width);
}

std::vector<at::Tensor> Prefix::trained() const {
  auto all = shared_trained();
  if (gate_weight_.defined()) all.insert(all.end(), {gate_weight_, gate_bias_});
  return all;
}

std::vector<at::Tensor> Prefix::shared_trained() const {
  if (index_ > 0) return {};
  const auto& s = *shared_;
  if (!s.projected) return {s.table};
  return {s.embedding, s.w1, s.b1, s.w2, s.b2};
}

namespace {

std::vector<Grafted> make(const std::shared_ptr<const AdapterConfig>& config,
                          const std::vector<Place>& places, uint64_t seed) {
  const auto own = own_config<PrefixTuningConfig>(config);
  std::vector<size_t> layers;
  for (size_t i = 0; i < places.size(); ++i)
    if (places[i].kind == SlotKind::attention) layers.push_back(i);
  if (layers.empty()) return {};
  const auto& first = places[layers[0]];
  for (const auto i : layers)
    if (places[i].kv_heads != first.kv_heads || places[i].head_dim != first.head_dim)
      throw Error("inject", fmt::format("a prefix needs layers alike: '{}' has {} key heads of {}, "
                                        "'{}' has {} of {}",
                                        first.path, first.kv_heads, first.head_dim, places[i].path,
                                        places[i].kv_heads, places[i].head_dim));
  const auto shared = std::make_shared<PrefixTable>();
  shared->layers = static_cast<int64_t>(layers.size());
  shared->width = first.kv_heads * first.head_dim;
  shared->projected = own->prefix_projection;
  if (own->num_layers && *own->num_layers != shared->layers)
    throw Error("inject", fmt::format("the prefix is for {} layers, and this model has {}",
                                      *own->num_layers, shared->layers));
  if (own->token_dim && *own->token_dim != shared->width)
    throw Error("inject",
                fmt::format("the prefix is for keys of width {}, and those of this model "
                            "have {} ({} heads of {})",
                            *own->token_dim, shared->width, first.kv_heads, first.head_dim));
  const int64_t t = *own->num_virtual_tokens, wide = 2 * shared->layers * shared->width;
  auto generator = stream(seed);
  const auto uniform = [&](at::IntArrayRef sizes, int64_t fan) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(fan));
    return at::empty(sizes, at::kFloat).uniform_(-bound, bound, generator);
  };
  shared->table = at::zeros({t, wide}, at::kFloat);
  if (shared->projected) {
    const int64_t e = own->encoder_input_size.value_or(shared->width);
    const int64_t m = own->encoder_hidden_size.value_or(e);
    shared->embedding = at::empty({t, e}, at::kFloat).normal_(0.0, 1.0, generator);
    shared->w1 = uniform({m, e}, e);
    shared->b1 = uniform({m}, e);
    shared->w2 = uniform({wide, m}, m);
    shared->b2 = uniform({wide}, m);
  } else if (own->init_weights != "zero") {
    shared->table.normal_(0.0, 1.0, generator);
  }
  std::vector<Grafted> made;
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto& place = places[layers[i]];
    made.push_back({layers[i], std::make_shared<Prefix>(own, shared, static_cast<int64_t>(i), place,
                                                        generator)});
  }
  return made;
}

const bool registered = register_method("PREFIX_TUNING", {.make = make});

}  // namespace
}  // namespace budwood
