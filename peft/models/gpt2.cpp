#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/models/attend.h>
#include <budwood/peft/models/gpt2.h>
#include <budwood/peft/models/registry.h>
#include <budwood/peft/ops/recompute.h>
#include <budwood/quant/error.h>
#include <algorithm>

namespace budwood::models {
namespace {

LinearSlot projection(WeightSource& source, const std::string& path, int64_t out, int64_t in) {
  return LinearSlot(source.transposed_matrix(path + ".weight", out, in),
                    source.vector(path + ".bias", out));
}

}  // namespace

Gpt2AttentionImpl::Gpt2AttentionImpl(const ModelConfig& c, int64_t layer, const std::string& path,
                                     WeightSource& source)
    : layer_(layer), heads_(c.num_attention_heads), head_dim_(c.head_dim) {
  const int64_t d = c.hidden_size;
  c_attn_ = register_module("c_attn", projection(source, path + ".c_attn", 3 * d, d));
  c_proj_ = register_module("c_proj", projection(source, path + ".c_proj", d, d));
  adapters_ = register_module("adapters", AttentionSlot(layer, heads_, heads_, head_dim_, d));
}

at::Tensor Gpt2AttentionImpl::forward(const ops::Source& x, const TokenBatch& batch,
                                      KvCache* cache) {
  const int64_t tokens = batch.tokens();
  const auto parts = forward_together(x, {c_attn_})[0].chunk(3, -1);
  const auto heads = [&](const at::Tensor& t) {
    return t.contiguous().view({t.size(0), heads_, head_dim_});
  };
  const auto q = heads(parts[0]);
  const auto out = attend({.layer = layer_, .adds_beside = false}, adapters_, q, heads(parts[1]),
                          heads(parts[2]), batch, cache, {}, [&x] { return x.value(); });
  auto y =
      forward_together(ops::Source::plain(out.reshape({tokens, heads_ * head_dim_})), {c_proj_})[0];
  if (!adapters_->has_active()) return y;
  // As in HF PEFT, what attends beside is added behind GPT-2's output projection.
  const auto project = [&](const at::Tensor& hidden) -> KeyValues {
    const auto own = c_attn_.ptr()->forward(hidden).chunk(3, -1);
    return {heads(own[1]), heads(own[2])};
  };
  const auto added =
      adapters_->beside(at::zeros_like(out), {q, attention_scale(head_dim_), project});
  return y + added.reshape({tokens, heads_ * head_dim_});
}

Gpt2MlpImpl::Gpt2MlpImpl(const ModelConfig& c, const std::string& path, WeightSource& source)
    : activation_(c.activation) {
  const int64_t d = c.hidden_size, ff = c.intermediate_size;
  c_fc_ = register_module("c_fc", projection(source, path + ".c_fc", ff, d));
  c_proj_ = register_module("c_proj", projection(source, path + ".c_proj", d, ff));
}

at::Tensor Gpt2MlpImpl::forward(const ops::Source& x) {
  const auto h = forward_together(x, {c_fc_})[0];
  const auto act = activation_ == "relu"
                       ? ops::Source::plain(at::relu(h))
                       : ops::Source::gelu(h, activation_ == "gelu" ? "none" : "tanh");
  return forward_together(act, {c_proj_})[0];
}

Gpt2BlockImpl::Gpt2BlockImpl(const ModelConfig& c, int64_t layer, const std::string& path,
                             WeightSource& source) {
  const int64_t d = c.hidden_size;
  ln_1_ = register_module("ln_1", LayerNorm(source, path + ".ln_1", d, c.layer_norm_eps));
  attn_ = register_module("attn", Gpt2Attention(c, layer, path + ".attn", source));
  ln_2_ = register_module("ln_2", LayerNorm(source, path + ".ln_2", d, c.layer_norm_eps));
  mlp_ = register_module("mlp", Gpt2Mlp(c, path + ".mlp", source));
  attention_adapters_ = register_module("attention_adapters", BlockSlot("attention", layer, d));
  output_adapters_ = register_module("output_adapters", BlockSlot("feed_forward", layer, d));
}

at::Tensor Gpt2BlockImpl::forward(const at::Tensor& x, const TokenBatch& batch, KvCache* cache) {
  const auto layout = batch.layout(!cache || cache->length() == 0);
  const auto h = attention_adapters_->forward(attn_(ln_1_->of(x), batch, cache), x, {}, layout);
  return output_adapters_->forward(mlp_(ln_2_->of(h)), h, {}, layout);
}

Gpt2ForCausalLM::Gpt2ForCausalLM(ModelConfig model_config, WeightSource& source)
    : CausalLM(std::move(model_config)), dtype_(source.dtype()) {
  const auto& c = config();
  // Folders of the bare model have no "transformer." in front.
  const std::string start = source.has("transformer.wte.weight") ? "transformer." : "";
  auto table = source.matrix(start + "wte.weight", c.vocab_size, c.hidden_size);
  auto head =
      c.tie_word_embeddings ? table : source.matrix("lm_head.weight", c.vocab_size, c.hidden_size);
  auto body = register_module("transformer", std::make_shared<torch::nn::Module>());
  wte_ = body->register_module("wte", EmbeddingSlot(std::move(table)));
  wpe_ = body->register_module(
      "wpe",
      EmbeddingSlot(source.matrix(start + "wpe.weight", c.max_position_embeddings, c.hidden_size)));
  auto blocks = body->register_module("h", std::make_shared<torch::nn::Module>());
  for (int64_t i = 0; i < c.num_hidden_layers; ++i)
    layers_.push_back(blocks->register_module(
        std::to_string(i), Gpt2Block(c, i, fmt::format("{}h.{}", start, i), source)));
  ln_f_ = body->register_module("ln_f",
                                LayerNorm(source, start + "ln_f", c.hidden_size, c.layer_norm_eps));
  lm_head_ = register_module("lm_head", LinearSlot(std::move(head)));
}

at::Tensor Gpt2ForCausalLM::hidden(const TokenBatch& given, KvCache* cache) {
  if (cache) require_one_length(given);
  const bool from_start = !cache || cache->length() == 0;
  const auto batch = from_start ? with_virtual_tokens(given).first : given;
  const auto& adapters = layers_.at(0)->adapters();
  const int64_t prefixed = from_start ? prefix_tokens(adapters) : 0;
  const auto positions = token_positions(adapters, batch, from_start);
  if (positions.numel() > 0 && positions.max().item<int64_t>() >= config().max_position_embeddings)
    throw Error("hidden",
                fmt::format("position {} is outside the {} positions of the model",
                            positions.max().item<int64_t>(), config().max_position_embeddings));
  if (input()->among_embeddings())
    throw Error("hidden", "virtual tokens among='embeddings' are for encoders");
  auto x = wte_(batch.ids, dtype_);
  if (!batch.virtual_rows.empty()) x = input()->forward(x, batch.virtual_rows);
  x = x + wpe_(positions, dtype_);
  const auto elsewhere = checkpointing() > 0 ? read_elsewhere(*this) : std::vector<at::Tensor>{};
  for (size_t i = 0; i < layers_.size(); ++i) {
    auto& layer = layers_[i];
    if (!is_checkpointed(i) || cache) {
      x = layer(x, batch, cache);
      continue;
    }
    x = ops::recompute(
        [=](const at::Tensor& input) { return layer.ptr()->forward(input, batch, nullptr); }, x,
        together(trained_parameters(*layer), elsewhere));
  }
  if (cache) cache->advance(batch.longest() + prefixed);
  return ln_f_(x);
}

at::Tensor Gpt2ForCausalLM::logits(const at::Tensor& hidden) {
  return lm_head_.get()->forward(hidden);
}

std::vector<at::Tensor> Gpt2ForCausalLM::head_parameters() const {
  return trained_parameters(*lm_head_);
}

std::optional<quant::Weight> Gpt2ForCausalLM::plain_head() const {
  return lm_head_->plain_weight();
}

bool Gpt2ForCausalLM::stores_transposed(const std::string& path) const {
  return path.ends_with(".c_attn") || path.ends_with(".c_proj") || path.ends_with(".c_fc");
}

namespace {

const bool registered = register_model(
    "gpt2", [](ModelConfig config, WeightSource& source) -> std::shared_ptr<CausalLM> {
      return std::make_shared<Gpt2ForCausalLM>(std::move(config), source);
    });

}  // namespace
}  // namespace budwood::models
