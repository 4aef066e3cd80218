#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/peft/io/file.h>
#include <budwood/peft/models/attend.h>
#include <budwood/peft/models/bert.h>
#include <budwood/peft/models/hf_source.h>
#include <budwood/peft/models/model.h>
#include <budwood/peft/models/quantizing_source.h>
#include <budwood/peft/models/virtual_tokens.h>
#include <budwood/peft/ops/recompute.h>
#include <budwood/peft/tensor_file.h>
#include <budwood/quant/error.h>
#include <nlohmann/json.hpp>

namespace budwood::models {
namespace {

using Json = nlohmann::json;

LinearSlot projection(WeightSource& source, const std::string& path, int64_t out, int64_t in) {
  return LinearSlot(source.matrix(path + ".weight", out, in), source.vector(path + ".bias", out));
}

// A container below a module, made once.
torch::nn::Module& child(torch::nn::Module& parent, const std::string& name) {
  const auto children = parent.named_children();
  if (const auto* known = children.find(name)) return **known;
  return *parent.register_module(name, std::make_shared<torch::nn::Module>());
}

int64_t size_of(const Json& json, const char* key) {
  const auto it = json.find(key);
  if (it == json.end() || !it->is_number_integer() || it->get<int64_t>() < 1)
    throw Error("config.json", fmt::format("'{}' is a positive size, found {}", key,
                                           it == json.end() ? "nothing" : it->dump()));
  return it->get<int64_t>();
}

std::string text_of(const Json& json, const char* key, const std::string& usual) {
  const auto it = json.find(key);
  if (it == json.end() || it->is_null()) return usual;
  return it->is_string() ? it->get<std::string>() : it->dump();
}

BertConfig parse(const Json& json) {
  const auto type = text_of(json, "model_type", "");
  if (type != "bert")
    throw Error("config.json",
                fmt::format("model type '{}' is not supported here; supported: bert", type));
  const auto position = text_of(json, "position_embedding_type", "absolute");
  if (position != "absolute")
    throw Error("config.json", fmt::format("position_embedding_type '{}' is not supported; "
                                           "supported: absolute",
                                           position));
  BertConfig c;
  c.vocab_size = size_of(json, "vocab_size");
  c.hidden_size = size_of(json, "hidden_size");
  c.intermediate_size = size_of(json, "intermediate_size");
  c.num_hidden_layers = size_of(json, "num_hidden_layers");
  c.num_attention_heads = size_of(json, "num_attention_heads");
  c.max_position_embeddings = size_of(json, "max_position_embeddings");
  c.type_vocab_size = json.contains("type_vocab_size") ? size_of(json, "type_vocab_size") : 2;
  c.layer_norm_eps = json.value("layer_norm_eps", 1e-12);
  c.hidden_act = text_of(json, "hidden_act", "gelu");
  if (c.hidden_act != "gelu" && c.hidden_act != "gelu_new" && c.hidden_act != "relu")
    throw Error("config.json", fmt::format("activation '{}' is not supported; supported: gelu, "
                                           "gelu_new, relu",
                                           c.hidden_act));
  if (c.hidden_size % c.num_attention_heads != 0)
    throw Error("config.json",
                fmt::format("hidden_size ({}) is not a multiple of num_attention_heads ({})",
                            c.hidden_size, c.num_attention_heads));
  if (json.contains("id2label") && json.at("id2label").is_object())
    c.num_labels = static_cast<int64_t>(json.at("id2label").size());
  else
    c.num_labels = 2;  // what transformers assumes
  return c;
}

}  // namespace

BertConfig BertConfig::from_json(const std::string& text) {
  try {
    auto config = parse(Json::parse(text));
    config.source_json = text;
    return config;
  } catch (const nlohmann::json::exception& e) {
    throw Error("config.json", e.what());
  }
}

BertLayerImpl::BertLayerImpl(const BertConfig& c, int64_t layer, const std::string& path,
                             WeightSource& source)
    : heads_(c.num_attention_heads),
      head_dim_(c.hidden_size / c.num_attention_heads),
      activation_(c.hidden_act) {
  const int64_t d = c.hidden_size, ff = c.intermediate_size;
  auto& attention = child(*this, "attention");
  auto& self = child(attention, "self");
  const auto in_self = [&](const char* name) {
    return self.register_module(name, projection(source, path + ".attention.self." + name, d, d));
  };
  query_ = in_self("query");
  key_ = in_self("key");
  value_ = in_self("value");
  adapters_ = self.register_module("adapters", AttentionSlot(layer, heads_, heads_, head_dim_, d));
  auto& attention_output = child(attention, "output");
  attention_dense_ = attention_output.register_module(
      "dense", projection(source, path + ".attention.output.dense", d, d));
  attention_norm_ = attention_output.register_module(
      "LayerNorm", LayerNorm(source, path + ".attention.output.LayerNorm", d, c.layer_norm_eps));
  attention_adapters_ =
      attention_output.register_module("adapters", BlockSlot("attention", layer, d));
  intermediate_ =
      child(*this, "intermediate")
          .register_module("dense", projection(source, path + ".intermediate.dense", ff, d));
  auto& output = child(*this, "output");
  dense_ = output.register_module("dense", projection(source, path + ".output.dense", d, ff));
  norm_ = output.register_module(
      "LayerNorm", LayerNorm(source, path + ".output.LayerNorm", d, c.layer_norm_eps));
  output_adapters_ = output.register_module("adapters", BlockSlot("feed_forward", layer, d));
}

at::Tensor BertLayerImpl::attention(const at::Tensor& x, const TokenBatch& batch) {
  const int64_t tokens = x.size(0);
  const auto heads = [&](const at::Tensor& t) { return t.view({t.size(0), heads_, head_dim_}); };
  const auto qkv = forward_together(ops::Source::plain(x), {query_, key_, value_});
  const auto project = [&](const at::Tensor& hidden) -> KeyValues {
    return {heads(key_.ptr()->forward(hidden)), heads(value_.ptr()->forward(hidden))};
  };
  const auto out = attend({.causal = false}, adapters_, heads(qkv[0]), heads(qkv[1]), heads(qkv[2]),
                          batch, nullptr, project, [&x] { return x; });
  return forward_together(ops::Source::plain(out.reshape({tokens, heads_ * head_dim_})),
                          {attention_dense_})[0];
}

at::Tensor BertLayerImpl::forward(const at::Tensor& x, const TokenBatch& batch) {
  const auto layout = batch.layout();
  const auto norm_of = [](LayerNorm norm) {
    return [norm](const at::Tensor& sum) { return norm.ptr()->forward(sum); };
  };
  const auto h =
      attention_adapters_->forward(attention(x, batch), x, norm_of(attention_norm_), layout);
  const auto inner = forward_together(ops::Source::plain(h), {intermediate_})[0];
  const auto act = activation_ == "relu"
                       ? ops::Source::plain(at::relu(inner))
                       : ops::Source::gelu(inner, activation_ == "gelu" ? "none" : "tanh");
  return output_adapters_->forward(forward_together(act, {dense_})[0], h, norm_of(norm_), layout);
}

Bert::Bert(BertConfig given, WeightSource& source, int64_t num_labels, uint64_t seed)
    : config_(std::move(given)), dtype_(source.dtype()) {
  const auto& c = config_;
  const int64_t d = c.hidden_size;
  const std::string start = source.has("bert.embeddings.word_embeddings.weight") ? "bert." : "";
  const bool has_head = source.has("classifier.weight");
  torch::nn::Module& body = has_head || num_labels > 0 ? child(*this, "bert") : *this;
  auto& embeddings = child(body, "embeddings");
  const auto table = [&](const char* name, int64_t rows) {
    return embeddings.register_module(
        name,
        EmbeddingSlot(source.matrix(fmt::format("{}embeddings.{}.weight", start, name), rows, d)));
  };
  words_ = table("word_embeddings", c.vocab_size);
  positions_ = table("position_embeddings", c.max_position_embeddings);
  types_ = table("token_type_embeddings", c.type_vocab_size);
  norm_ = embeddings.register_module(
      "LayerNorm", LayerNorm(source, start + "embeddings.LayerNorm", d, c.layer_norm_eps));
  auto& layers = child(child(body, "encoder"), "layer");
  for (int64_t i = 0; i < c.num_hidden_layers; ++i)
    layers_.push_back(layers.register_module(
        std::to_string(i), BertLayer(c, i, fmt::format("{}encoder.layer.{}", start, i), source)));
  if (source.has(start + "pooler.dense.weight"))
    pooler_ = child(body, "pooler")
                  .register_module("dense", projection(source, start + "pooler.dense", d, d));
  input_ = register_module("input", InputSlot(c.vocab_size, d));
  if (has_head) {
    classifier_ = register_module("classifier", projection(source, "classifier", c.num_labels, d));
  } else if (num_labels > 0) {
    config_.num_labels = num_labels;
    auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
    const auto w = at::empty({num_labels, d}, at::kFloat).normal_(0.0, 0.02, generator);
    classifier_ = register_module(
        "classifier", LinearSlot(quant::Weight::dense(w.to(dtype_)),
                                 at::zeros({num_labels}, at::TensorOptions().dtype(dtype_))));
  } else {
    config_.num_labels = 0;
  }
  if (has_classifier() && pooler_.is_empty())
    throw Error("load_bert", "a classifier reads the pooler, and the folder has none");
}

std::pair<TokenBatch, at::Tensor> Bert::run(const TokenBatch& given) {
  const bool late = input_->among_embeddings();
  const auto full = with_virtual_tokens(input_, given, {}).first;
  const auto& batch = late ? given : full;
  const auto positions = token_positions(layers_.at(0)->adapters(), batch, /*from_start=*/true);
  if (positions.numel() > 0 && positions.max().item<int64_t>() >= config_.max_position_embeddings)
    throw Error("hidden",
                fmt::format("position {} is outside the {} positions of the model",
                            positions.max().item<int64_t>(), config_.max_position_embeddings));
  auto words = words_(batch.ids, dtype_);
  if (!late && !full.virtual_rows.empty()) words = input_->forward(words, full.virtual_rows);
  auto x = norm_(words + types_(at::zeros_like(batch.ids), dtype_) + positions_(positions, dtype_));
  if (late) {
    const auto from = at::tensor(full.virtual_rows, at::kLong).clamp_min(0).to(x.device());
    x = input_->forward(x.index_select(0, from), full.virtual_rows);
  }
  std::vector<at::Tensor> elsewhere;
  if (checkpoint_every_ > 0) elsewhere = read_elsewhere(*this);
  for (size_t i = 0; i < layers_.size(); ++i) {
    auto& layer = layers_[i];
    if (checkpoint_every_ == 0 || static_cast<int64_t>(i) % checkpoint_every_ != 0) {
      x = layer(x, full);
      continue;
    }
    x = ops::recompute([=](const at::Tensor& in) { return layer.ptr()->forward(in, full); }, x,
                       together(trained_parameters(*layer), elsewhere));
  }
  return {full, x};
}

at::Tensor Bert::hidden(const TokenBatch& batch) {
  return run(batch).second;
}

at::Tensor Bert::sentence_embedding(const TokenBatch& given, bool normalize) {
  const auto [batch, x] = run(given);
  std::vector<at::Tensor> means;
  for (size_t s = 0; s + 1 < batch.cu_seqlens.size(); ++s) {
    std::vector<int64_t> rows;
    for (int64_t i = batch.cu_seqlens[s]; i < batch.cu_seqlens[s + 1]; ++i)
      if (batch.virtual_rows.empty() || batch.virtual_rows[static_cast<size_t>(i)] >= 0)
        rows.push_back(i);
    if (rows.empty())
      throw Error("sentence_embedding", fmt::format("sequence {} has no tokens", s));
    const auto index = at::tensor(rows, at::TensorOptions().dtype(at::kLong)).to(x.device());
    means.push_back(x.index_select(0, index).to(at::kFloat).mean(0));
  }
  const auto all = at::stack(means);
  return normalize ? all / all.norm(2, 1, true).clamp_min(1e-12) : all;
}

at::Tensor Bert::classify(const TokenBatch& given) {
  if (!has_classifier()) throw Error("classify", "the model was loaded without a classifier");
  const auto [batch, x] = run(given);
  // As transformers does, the first row stands for the sequence, also when it is a virtual token.
  const std::vector<int64_t> first(batch.cu_seqlens.begin(), batch.cu_seqlens.end() - 1);
  const auto index = at::tensor(first, at::TensorOptions().dtype(at::kLong)).to(x.device());
  const auto pooled = at::tanh(pooler_.ptr()->forward(x.index_select(0, index)));
  return classifier_.ptr()->forward(pooled);
}

at::Tensor Bert::loss(const TokenBatch& batch, const at::Tensor& labels) {
  return at::cross_entropy_loss(classify(batch).to(at::kFloat), labels);
}

void Bert::set_checkpointing(int64_t every) {
  if (every < 0)
    throw Error("set_checkpointing",
                fmt::format("every k-th block is checkpointed, 0 for none; found {}", every));
  checkpoint_every_ = every;
}

std::shared_ptr<Bert> load_bert(const std::string& folder, const LoadOptions& options,
                                int64_t num_labels, uint64_t seed) {
  const auto file = std::filesystem::path(folder) / "config.json";
  if (!std::filesystem::exists(file))
    throw Error("load_bert", fmt::format("'{}' has no config.json", folder));
  auto config = BertConfig::from_json(io::read_file(file));
  std::optional<at::ScalarType> dtype;
  if (options.dtype != "auto") dtype = scalar_type_of(options.dtype);
  HfSource files(folder, dtype);
  std::shared_ptr<Bert> model;
  if (options.quantize.empty()) {
    model = std::make_shared<Bert>(config, files, num_labels, seed);
  } else {
    auto skip = options.quantize_skip;
    skip.push_back("classifier");
    QuantizingSource source(files,
                            {.format = options.quantize,
                             .block_size = options.block_size,
                             .double_quant = options.double_quant,
                             .method = options.quantize_method},
                            skip, options.on_quantized);
    model = std::make_shared<Bert>(config, source, num_labels, seed);
  }
  std::vector<std::string> strays;
  for (const auto& name : files.unused())
    if (!name.ends_with("position_ids") && !name.starts_with("cls.")) strays.push_back(name);
  if (!strays.empty())
    throw Error("load_bert",
                fmt::format("{}: tensors that do not belong to a BERT model of {} "
                            "layers: {}",
                            folder, config.num_hidden_layers, fmt::join(strays, ", ")));
  model->eval();
  return model;
}

}  // namespace budwood::models
