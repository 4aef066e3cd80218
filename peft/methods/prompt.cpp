#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/method.h>
#include <budwood/peft/methods/prompt.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <cmath>

namespace budwood {
namespace {

// Ids of the tokens whose embeddings the prompt starts from.
std::vector<int64_t> initial_ids(const PromptTuningConfig& config, int64_t vocabulary,
                                 at::Generator generator) {
  const int64_t t = *config.num_virtual_tokens;
  std::vector<int64_t> ids;
  if (config.prompt_tuning_init == "SAMPLE_VOCAB") {
    const auto drawn = at::randint(0, vocabulary, {t}, generator, at::kLong);
    for (int64_t i = 0; i < t; ++i) ids.push_back(drawn[i].item<int64_t>());
    return ids;
  }
  const auto& text = config.init_token_ids;
  if (text.empty())
    throw Error("inject",
                "prompt_tuning_init is TEXT: give the text's token ids as init_token_ids");
  for (int64_t i = 0; i < t; ++i) ids.push_back(text[static_cast<size_t>(i) % text.size()]);
  for (const auto id : ids)
    if (id < 0 || id >= vocabulary)
      throw Error("inject", fmt::format("init_token_ids has {}, and the vocabulary has {} tokens",
                                        id, vocabulary));
  return ids;
}

}  // namespace

void VirtualTokens::start(at::Tensor table, Placement placement) {
  table_ = register_parameter("prompt_embeddings", std::move(table));
  placement_ = std::move(placement);
  encoded_ = !encoder().empty();
  if (encoded_) table_.set_requires_grad(false);
}

at::Tensor VirtualTokens::tokens() const {
  return encoded_ ? encode(is_training()) : table_;
}

AdapterState VirtualTokens::shared_state() const {
  if (encoded_) {
    at::NoGradGuard no_grad;
    auto table = table_;
    table.copy_(encode(/*training=*/false));
  }
  AdapterState all{{"prompt_embeddings", table_}};
  if (encoded_)
    for (const auto& [name, tensor] : encoder())
      all.emplace_back("budwood.prompt_encoder." + name, tensor);
  return all;
}

void VirtualTokens::loaded(const std::vector<std::string>& found) {
  // Without the encoder's tensors, as in HF PEFT's files, the table stands for itself.
  encoded_ = encoded_ && found.size() >= encoder().size();
}

void VirtualTokens::describe(AdapterConfig& saved, const std::string&) const {
  auto& config = dynamic_cast<VirtualTokensConfig&>(saved);
  config.token_dim = table_.size(1);
  if (!config.num_transformer_submodules) config.num_transformer_submodules = 1;
}

std::vector<at::Tensor> VirtualTokens::trained() const {
  if (!encoded_) return {table_};
  std::vector<at::Tensor> all;
  for (const auto& [name, tensor] : encoder()) all.push_back(tensor);
  return all;
}

PromptTuning::PromptTuning(std::shared_ptr<const PromptTuningConfig> config, int64_t hidden,
                           const quant::Weight* table, uint64_t seed)
    : VirtualTokens(config) {
  const int64_t t = *config->num_virtual_tokens;
  auto generator = stream(seed);
  at::Tensor start_values;
  if (config->prompt_tuning_init == "RANDOM") {
    start_values = at::empty({t, hidden}, at::kFloat).normal_(0.0, 1.0, generator);
  } else {
    if (!table || table->in != hidden)
      throw Error("inject", fmt::format("prompt_tuning_init {} needs the model's token table, and "
                                        "there is none of width {}",
                                        config->prompt_tuning_init, hidden));
    const auto ids = at::tensor(initial_ids(*config, table->out, generator), at::kLong);
    start_values = table->gather(ids, at::kFloat).clone();
  }
  start(start_values, Placement::parse(config->placement, t));
}

bool PromptTuning::among_embeddings() const {
  return static_cast<const PromptTuningConfig&>(*config()).among == "embeddings";
}

PromptEncoder::PromptEncoder(std::shared_ptr<const PromptEncoderConfig> config, int64_t hidden,
                             uint64_t seed)
    : VirtualTokens(config), width_(config->encoder_hidden_size.value_or(hidden)) {
  auto generator = stream(seed);
  const int64_t t = *config->num_virtual_tokens, m = width_;
  const auto keep = [&](const std::string& name, at::Tensor value) {
    auto flat = name;
    std::replace(flat.begin(), flat.end(), '.', '_');
    encoder_.emplace_back(name, register_parameter(flat, std::move(value)));
    return encoder_.back().second;
  };
  const auto uniform = [&](at::IntArrayRef sizes, int64_t fan) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(fan));
    return at::empty(sizes, at::kFloat).uniform_(-bound, bound, generator);
  };
  const auto layer = [&](const std::string& name, int64_t out, int64_t in) {
    keep(name + ".weight", uniform({out, in}, in));
    keep(name + ".bias", uniform({out}, in));
  };
  keep("embedding.weight", at::empty({t, hidden}, at::kFloat).normal_(0.0, 1.0, generator));
  if (config->encoder_reparameterization_type == "LSTM") {
    for (int64_t i = 0; i < config->encoder_num_layers; ++i)
      for (const char* direction : {"", "_reverse"}) {
        const int64_t in = i == 0 ? hidden : 2 * m;
        const auto part = [&](const char* what, at::IntArrayRef sizes) {
          lstm_.push_back(
              keep(fmt::format("lstm_head.{}_l{}{}", what, i, direction), uniform(sizes, m)));
        };
        part("weight_ih", {4 * m, in});
        part("weight_hh", {4 * m, m});
        part("bias_ih", {4 * m});
        part("bias_hh", {4 * m});
      }
    head_ = encoder_.size();
    layer("mlp_head.0", 2 * m, 2 * m);
    layer("mlp_head.2", hidden, 2 * m);
  } else {
    head_ = encoder_.size();
    layer("mlp_head.0", m, hidden);
    layer("mlp_head.2", m, m);
    layer("mlp_head.4", hidden, m);
  }
  start(at::zeros({t, hidden}, at::kFloat), Placement::parse(config->placement, t));
}

const PromptEncoderConfig& PromptEncoder::own() const {
  return static_cast<const PromptEncoderConfig&>(*config());
}

at::Tensor PromptEncoder::linear(size_t i, const at::Tensor& x) const {
  return at::linear(x, encoder_[head_ + 2 * i].second, encoder_[head_ + 2 * i + 1].second);
}

at::Tensor PromptEncoder::encode(bool training) const {
  auto x = encoder_[0].second;
  if (!lstm_.empty()) {
    const auto zero = at::zeros({2 * own().encoder_num_layers, 1, width_}, x.options());
    const auto out = at::lstm(x.unsqueeze(0), {zero, zero}, lstm_, /*has_biases=*/true,
                              own().encoder_num_layers, own().encoder_dropout, training,
                              /*bidirectional=*/true, /*batch_first=*/true);
    return linear(1, at::relu(linear(0, std::get<0>(out).squeeze(0))));
  }
  return linear(2, at::relu(linear(1, at::relu(linear(0, x)))));
}

void PromptEncoder::describe(AdapterConfig& saved, const std::string& path) const {
  VirtualTokens::describe(saved, path);
  static_cast<PromptEncoderConfig&>(saved).encoder_hidden_size = width_;
}

namespace {

// The one place for virtual tokens, and the token table that goes with it.
template <class Make>
std::vector<Grafted> at_the_input(const std::vector<Place>& places, Make make_adapter) {
  const quant::Weight* table = nullptr;
  for (const auto& place : places)
    if (place.kind == SlotKind::embedding && !table) table = &place.base.weight;
  std::vector<Grafted> made;
  for (size_t i = 0; i < places.size(); ++i)
    if (places[i].kind == SlotKind::input) made.push_back({i, make_adapter(places[i], table)});
  return made;
}

std::vector<Grafted> make_prompt(const std::shared_ptr<const AdapterConfig>& config,
                                 const std::vector<Place>& places, uint64_t) {
  const auto own = own_config<PromptTuningConfig>(config);
  return at_the_input(places, [&](const Place& place, const quant::Weight* table) {
    return std::make_shared<PromptTuning>(own, place.hidden, table, place.seed);
  });
}

std::vector<Grafted> make_encoder(const std::shared_ptr<const AdapterConfig>& config,
                                  const std::vector<Place>& places, uint64_t) {
  const auto own = own_config<PromptEncoderConfig>(config);
  return at_the_input(places, [&](const Place& place, const quant::Weight*) {
    return std::make_shared<PromptEncoder>(own, place.hidden, place.seed);
  });
}

const bool registered[] = {register_method("PROMPT_TUNING", {.make = make_prompt}),
                           register_method("P_TUNING", {.make = make_encoder})};

}  // namespace
}  // namespace budwood
