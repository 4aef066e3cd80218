#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/models/attend.h>
#include <budwood/peft/models/llama.h>
#include <budwood/peft/models/registry.h>
#include <budwood/peft/ops/cross_entropy.h>
#include <budwood/peft/ops/gated.h>
#include <budwood/peft/ops/kept.h>
#include <budwood/peft/ops/norm.h>
#include <budwood/peft/ops/recompute.h>
#include <budwood/peft/ops/rotary.h>
#include <budwood/quant/error.h>
#include <algorithm>

namespace budwood::models {
namespace {

LinearSlot projection(WeightSource& source, const std::string& path, int64_t out, int64_t in,
                      bool bias) {
  return LinearSlot(source.matrix(path + ".weight", out, in),
                    bias ? source.vector(path + ".bias", out) : at::Tensor());
}

RmsNorm norm_from(WeightSource& source, const std::string& path, int64_t size, double eps) {
  return RmsNorm(source.vector(path + ".weight", size), eps);
}

InputGroup one_projection(const std::string& path, const LinearSlot& slot) {
  InputGroup group{.projections = {{path, slot}}};
  group.output = [slot](const at::Tensor& x, const TokenBatch&) { return slot.ptr()->forward(x); };
  return group;
}

// Of an activation's element.
int64_t kept_bytes_of(at::ScalarType type) {
  return static_cast<int64_t>(c10::elementSize(ops::kept_type(type)));
}

// What a slot keeps of a token beside its input: x Aᵀ, or for adapters that run on their own the
// input as they read it.
int64_t slot_keeps(const LinearSlot& slot, at::ScalarType type) {
  constexpr int64_t fp32 = 4;
  const int64_t element = kept_bytes_of(type);
  const auto terms = slot->terms();
  if (const auto p = slot->projection(terms)) {
    const int64_t gained = terms.empty() || !terms[0].gain.defined() ? 0 : slot->out_features();
    return (p->a.defined() ? p->a.size(0) * fp32 : 0) + gained * element;
  }
  const auto adapters = static_cast<int64_t>(terms.size());
  return slot->in_features() * (element + adapters * (fp32 + 1));
}

}  // namespace

RmsNormImpl::RmsNormImpl(at::Tensor w, double eps) : eps_(eps) {
  weight = register_parameter("weight", std::move(w), /*requires_grad=*/false);
}

at::Tensor RmsNormImpl::forward(const at::Tensor& x) {
  return ops::rms_norm(x, weight, eps_);
}

ops::Source RmsNormImpl::of(const at::Tensor& x) const {
  return ops::Source::rms_norm(x, weight, eps_);
}

LlamaAttentionImpl::LlamaAttentionImpl(const ModelConfig& c, int64_t layer, const std::string& path,
                                       WeightSource& source)
    : layer_(layer),
      heads_(c.num_attention_heads),
      kv_heads_(c.num_key_value_heads),
      head_dim_(c.head_dim),
      window_(c.sliding_window.empty() ? 0 : c.sliding_window[static_cast<size_t>(layer)]) {
  const int64_t q = heads_ * head_dim_, kv = kv_heads_ * head_dim_, d = c.hidden_size;
  q_proj_ = register_module("q_proj", projection(source, path + ".q_proj", q, d, c.attention_bias));
  k_proj_ =
      register_module("k_proj", projection(source, path + ".k_proj", kv, d, c.attention_bias));
  v_proj_ =
      register_module("v_proj", projection(source, path + ".v_proj", kv, d, c.attention_bias));
  o_proj_ =
      register_module("o_proj", projection(source, path + ".o_proj", d, q, c.attention_out_bias));
  adapters_ = register_module("adapters", AttentionSlot(layer, heads_, kv_heads_, head_dim_, d));
  if (c.qk_norm) {
    q_norm_ =
        register_module("q_norm", norm_from(source, path + ".q_norm", head_dim_, c.rms_norm_eps));
    k_norm_ =
        register_module("k_norm", norm_from(source, path + ".k_norm", head_dim_, c.rms_norm_eps));
  }
}

at::Tensor LlamaAttentionImpl::forward(const ops::Source& x, const TokenBatch& batch,
                                       const RotaryTable::Angles& angles, KvCache* cache) {
  const int64_t tokens = batch.tokens();
  const auto qkv = forward_together(x, {q_proj_, k_proj_, v_proj_});
  auto q = qkv[0].view({tokens, heads_, head_dim_});
  auto k = qkv[1].view({tokens, kv_heads_, head_dim_});
  auto v = qkv[2].view({tokens, kv_heads_, head_dim_});
  if (!q_norm_.is_empty()) {
    q = q_norm_(q);
    k = k_norm_(k);
  }
  q = ops::rotate(q, angles.cos, angles.sin);
  k = ops::rotate(k, angles.cos, angles.sin);
  const auto project = [this](const at::Tensor& hidden) -> KeyValues {
    const auto heads = [&](const LinearSlot& slot) {
      return slot.ptr()->forward(hidden).view({hidden.size(0), kv_heads_, head_dim_});
    };
    return {heads(k_proj_), heads(v_proj_)};
  };
  const auto out = attend({.layer = layer_, .window = window_}, adapters_, q, k, v, batch, cache,
                          project, [&x] { return x.value(); });
  return forward_together(ops::Source::plain(out.reshape({tokens, heads_ * head_dim_})),
                          {o_proj_})[0];
}

std::vector<InputGroup> LlamaAttentionImpl::input_groups(const std::string& path,
                                                         const RotaryTable& rotary,
                                                         const RmsNorm& before) {
  InputGroup qkv{.projections = {{path + ".q_proj", q_proj_, /*feeds_scores=*/true},
                                 {path + ".k_proj", k_proj_, /*feeds_scores=*/true},
                                 {path + ".v_proj", v_proj_}},
                 .norm = before->weight};
  qkv.output = [this, &rotary](const at::Tensor& x, const TokenBatch& batch) {
    return forward(ops::Source::plain(x), batch, rotary.at(batch.positions), nullptr);
  };
  auto out = one_projection(path + ".o_proj", o_proj_);
  // With fewer value heads than query heads a channel of v is several of o's.
  if (v_proj_->out_features() == o_proj_->in_features()) out.source = v_proj_;
  return {qkv, out};
}

int64_t LlamaAttentionImpl::kept_per_token(at::ScalarType type) const {
  // q, k, v and the result, and q and k before their norms; the logarithm of each sum of scores.
  const int64_t q = heads_ * head_dim_, kv = kv_heads_ * head_dim_;
  const int64_t normed = q_norm_.is_empty() ? 0 : q + kv;
  int64_t bytes = normed * kept_bytes_of(type) +
                  2 * (q + kv) * static_cast<int64_t>(c10::elementSize(type)) + heads_ * 4;
  for (const auto& slot : {q_proj_, k_proj_, v_proj_, o_proj_}) bytes += slot_keeps(slot, type);
  return bytes;
}

LlamaMlpImpl::LlamaMlpImpl(const ModelConfig& c, const std::string& path, WeightSource& source) {
  const int64_t d = c.hidden_size, ff = c.intermediate_size;
  gate_proj_ =
      register_module("gate_proj", projection(source, path + ".gate_proj", ff, d, c.mlp_bias));
  up_proj_ = register_module("up_proj", projection(source, path + ".up_proj", ff, d, c.mlp_bias));
  down_proj_ =
      register_module("down_proj", projection(source, path + ".down_proj", d, ff, c.mlp_bias));
}

at::Tensor LlamaMlpImpl::forward(const ops::Source& x) {
  const auto both = forward_together(x, {gate_proj_, up_proj_});
  return forward_together(ops::Source::gated(kernels::Gate::silu, both[0], both[1]),
                          {down_proj_})[0];
}

std::vector<InputGroup> LlamaMlpImpl::input_groups(const std::string& path, const RmsNorm& before) {
  InputGroup in{.projections = {{path + ".gate_proj", gate_proj_}, {path + ".up_proj", up_proj_}},
                .norm = before->weight};
  in.output = [this](const at::Tensor& x, const TokenBatch&) {
    return forward(ops::Source::plain(x));
  };
  auto out = one_projection(path + ".down_proj", down_proj_);
  out.source = up_proj_;
  return {in, out};
}

int64_t LlamaMlpImpl::kept_per_token(at::ScalarType type) const {
  int64_t bytes = 2 * gate_proj_->out_features() * kept_bytes_of(type);
  for (const auto& slot : {gate_proj_, up_proj_, down_proj_}) bytes += slot_keeps(slot, type);
  return bytes;
}

LlamaBlockImpl::LlamaBlockImpl(const ModelConfig& c, int64_t layer, const std::string& path,
                               WeightSource& source) {
  input_layernorm_ = register_module("input_layernorm", norm_from(source, path + ".input_layernorm",
                                                                  c.hidden_size, c.rms_norm_eps));
  self_attn_ = register_module("self_attn", LlamaAttention(c, layer, path + ".self_attn", source));
  post_attention_layernorm_ = register_module(
      "post_attention_layernorm",
      norm_from(source, path + ".post_attention_layernorm", c.hidden_size, c.rms_norm_eps));
  mlp_ = register_module("mlp", LlamaMlp(c, path + ".mlp", source));
  attention_adapters_ =
      register_module("attention_adapters", BlockSlot("attention", layer, c.hidden_size));
  output_adapters_ =
      register_module("output_adapters", BlockSlot("feed_forward", layer, c.hidden_size));
}

at::Tensor LlamaBlockImpl::forward(const at::Tensor& x, const TokenBatch& batch,
                                   const RotaryTable::Angles& angles, KvCache* cache) {
  const auto layout = batch.layout(!cache || cache->length() == 0);
  const auto h = attention_adapters_->forward(
      self_attn_(input_layernorm_->of(x), batch, angles, cache), x, {}, layout);
  return output_adapters_->forward(mlp_(post_attention_layernorm_->of(h)), h, {}, layout);
}

std::vector<InputGroup> LlamaBlockImpl::input_groups(const std::string& path,
                                                     const RotaryTable& rotary) {
  auto groups = self_attn_->input_groups(path + ".self_attn", rotary, input_layernorm_);
  for (auto& group : mlp_->input_groups(path + ".mlp", post_attention_layernorm_))
    groups.push_back(std::move(group));
  return groups;
}

int64_t LlamaBlockImpl::kept_per_token(at::ScalarType type) const {
  const int64_t inputs_of_norms = 2 * input_layernorm_->weight.numel() * kept_bytes_of(type);
  return inputs_of_norms + self_attn_->kept_per_token(type) + mlp_->kept_per_token(type);
}

LlamaForCausalLM::LlamaForCausalLM(ModelConfig model_config, WeightSource& source)
    : CausalLM(std::move(model_config)),
      dtype_(source.dtype()),
      rotary_(config().rope, config().head_dim) {
  const auto& c = config();
  auto table = source.matrix("model.embed_tokens.weight", c.vocab_size, c.hidden_size);
  auto head =
      c.tie_word_embeddings ? table : source.matrix("lm_head.weight", c.vocab_size, c.hidden_size);
  // Plain containers give the parameters transformers' paths.
  auto body = register_module("model", std::make_shared<torch::nn::Module>());
  embed_tokens_ = body->register_module("embed_tokens", EmbeddingSlot(std::move(table)));
  auto blocks = body->register_module("layers", std::make_shared<torch::nn::Module>());
  for (int64_t i = 0; i < c.num_hidden_layers; ++i)
    layers_.push_back(blocks->register_module(
        std::to_string(i), LlamaBlock(c, i, fmt::format("model.layers.{}", i), source)));
  norm_ =
      body->register_module("norm", norm_from(source, "model.norm", c.hidden_size, c.rms_norm_eps));
  lm_head_ = register_module("lm_head", LinearSlot(std::move(head)));
}

at::Tensor LlamaForCausalLM::hidden(const TokenBatch& given, KvCache* cache) {
  if (cache) require_one_length(given);
  const bool from_start = !cache || cache->length() == 0;
  const auto batch = from_start ? with_virtual_tokens(given).first : given;
  const auto& adapters = layers_.at(0)->adapters();
  const int64_t prefixed = from_start ? prefix_tokens(adapters) : 0;
  const auto angles = rotary_.at(token_positions(adapters, batch, from_start));
  auto x = embed(batch);
  const auto elsewhere = checkpointing() > 0 ? read_elsewhere(*this) : std::vector<at::Tensor>{};
  for (size_t i = 0; i < layers_.size(); ++i) {
    auto& layer = layers_[i];
    if (!is_checkpointed(i) || cache) {
      x = layer(x, batch, angles, cache);
      continue;
    }
    x = ops::recompute(
        [=](const at::Tensor& input) { return layer.ptr()->forward(input, batch, angles, {}); }, x,
        together(trained_parameters(*layer), elsewhere));
  }
  if (cache) cache->advance(batch.longest() + prefixed);
  return norm_(x);
}

at::Tensor LlamaForCausalLM::logits(const at::Tensor& hidden) {
  return lm_head_.get()->forward(hidden);
}

at::Tensor LlamaForCausalLM::embed(const TokenBatch& batch) {
  const auto rows = embed_tokens_(batch.ids, dtype_);
  return batch.virtual_rows.empty() ? rows : input()->forward(rows, batch.virtual_rows);
}

std::vector<Block> LlamaForCausalLM::blocks() {
  std::vector<Block> all;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const auto path = fmt::format("model.layers.{}", i);
    const auto run = [this, i](const at::Tensor& x, const TokenBatch& batch) {
      return layers_[i]->forward(x, batch, rotary_.at(batch.positions), nullptr);
    };
    all.push_back({path, run, layers_[i]->input_groups(path, rotary_)});
  }
  auto head = one_projection("lm_head", lm_head_);
  head.norm = norm_->weight;
  const auto run = [this](const at::Tensor& x, const TokenBatch&) { return logits(norm_(x)); };
  all.push_back({"lm_head", run, {head}});
  return all;
}

int64_t LlamaForCausalLM::kept_bytes(int64_t tokens) const {
  const auto element = static_cast<int64_t>(c10::elementSize(dtype_));
  int64_t all = 0, again = 0;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const int64_t own = layers_[i]->kept_per_token(dtype_);
    const bool checkpointed = is_checkpointed(i);
    all += checkpointed ? config().hidden_size * element : own;
    if (checkpointed) again = std::max(again, own);
  }
  return tokens * (all + again + config().hidden_size * element);
}

int64_t LlamaForCausalLM::passing_bytes(int64_t tokens) const {
  const auto element = static_cast<int64_t>(c10::elementSize(dtype_));
  const auto& c = config();
  // A chunk's logits; a gated activation with its gradient and those of gate and up, and gradients
  // of the hidden state.
  const int64_t logits = std::min<int64_t>(tokens, ops::LossOptions().chunk) * c.vocab_size * 4;
  const int64_t block = tokens * (4 * c.intermediate_size + 3 * c.hidden_size) * element;
  return std::max(logits, block);
}

std::vector<at::Tensor> LlamaForCausalLM::head_parameters() const {
  return trained_parameters(*lm_head_);
}

std::optional<quant::Weight> LlamaForCausalLM::plain_head() const {
  return lm_head_->plain_weight();
}

namespace {

const bool registered = [] {
  const auto make = [](ModelConfig config, WeightSource& source) -> std::shared_ptr<CausalLM> {
    return std::make_shared<LlamaForCausalLM>(std::move(config), source);
  };
  for (const char* type : {"llama", "mistral", "qwen2", "qwen3"}) register_model(type, make);
  return true;
}();

}  // namespace
}  // namespace budwood::models
