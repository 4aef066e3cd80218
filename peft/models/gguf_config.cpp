#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/models/gguf_config.h>
#include <budwood/peft/models/rope.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <cmath>
#include <cstring>

namespace budwood::models {
namespace {

// llama.cpp multiplies what YaRN's formula gives, transformers replaces it.
double default_attention_factor(RopeConfig rope) {
  rope.attention_factor = rope.mscale = rope.mscale_all_dim = {};
  return RotaryTable(rope, 2).attention_factor();
}

RopeConfig read_rope(const io::GgufFile& file, const std::string& arch, int64_t context,
                     int64_t head_dim) {
  RopeConfig rope;
  rope.theta = file.get_f32(arch + ".rope.freq_base", 10000.0f);
  const auto dimensions =
      file.get_u32(arch + ".rope.dimension_count", static_cast<uint32_t>(head_dim));
  if (static_cast<int64_t>(dimensions) != head_dim)
    throw Error("gguf", fmt::format("rope over {} of {} dimensions of a head is not supported",
                                    dimensions, head_dim));
  const auto type = file.get_string(arch + ".rope.scaling.type", "none");
  if (type != "none") {
    if (type != "linear" && type != "yarn")
      throw Error(
          "gguf",
          fmt::format("rope scaling '{}' is not supported; supported: none, linear, yarn", type));
    rope.type = type;
    rope.factor = file.get_f32(arch + ".rope.scaling.factor");
    rope.original_max_position = file.get_u32(arch + ".rope.scaling.original_context_length",
                                              static_cast<uint32_t>(context));
  }
  if (type == "yarn") {
    rope.beta_fast = file.get_f32(arch + ".rope.scaling.yarn_beta_fast", 32.0f);
    rope.beta_slow = file.get_f32(arch + ".rope.scaling.yarn_beta_slow", 1.0f);
    if (const auto key = arch + ".rope.scaling.attn_factor"; file.has(key))
      rope.attention_factor = file.get_f32(key) * default_attention_factor(rope);
  }
  if (const auto* divisors = file.find("rope_freqs.weight")) {
    if (divisors->type != io::GgmlType::f32 ||
        divisors->shape != std::vector<int64_t>{head_dim / 2})
      throw Error("gguf", fmt::format("rope_freqs.weight is F32 [{}]", head_dim / 2));
    rope.frequency_divisors.resize(static_cast<size_t>(head_dim / 2));
    divisors->read(0, rope.frequency_divisors.data(), divisors->bytes);
  }
  return rope;
}

std::optional<int64_t> token_id(const io::GgufFile& file, const std::string& key) {
  const auto name = "tokenizer.ggml." + key;
  if (!file.has(name)) return {};
  return file.get_u32(name);
}

// Where a per-layer list is allowed, all layers must agree: the models here have one size.
int64_t size_of(const io::GgufFile& file, const std::string& key) {
  const auto* value = file.find_value(key);
  if (value && std::holds_alternative<io::GgufArray>(*value)) {
    const auto sizes = file.get_integers(key);
    for (const auto size : sizes)
      if (size != sizes.front())
        throw Error("gguf",
                    fmt::format("'{}' differs from layer to layer, which is not supported", key));
    if (!sizes.empty()) return sizes.front();
  }
  return file.get_u32(key);
}

// A window counts where the file says for each layer whether it has one, as gguf_config writes it:
// other files of these architectures carry a window that llama.cpp ignores.
void read_windows(const io::GgufFile& file, const std::string& arch, ModelConfig& c) {
  const auto layers = static_cast<size_t>(c.num_hidden_layers);
  c.sliding_window.assign(layers, 0);
  const auto key = arch + ".attention.sliding_window";
  const auto* value = file.find_value(key + "_pattern");
  if (!value || !file.has(key)) return;
  const auto* array = std::get_if<io::GgufArray>(value);
  const auto* pattern = array ? std::get_if<std::vector<bool>>(array) : nullptr;
  if (!pattern || pattern->size() != layers)
    throw Error("gguf", fmt::format("'{}_pattern' is one bool for each of {} layers", key, layers));
  const int64_t window = file.get_u32(key);
  for (size_t i = 0; i < layers; ++i) c.sliding_window[i] = (*pattern)[i] ? window : 0;
  if (arch != "llama" || std::ranges::count(*pattern, true) == 0) return;
  if (c.attention_bias || c.attention_out_bias || c.mlp_bias ||
      std::ranges::count(*pattern, false) != 0)
    throw Error("gguf", "sliding windows in a model that is no Mistral are not supported");
  c.model_type = "mistral";
  c.architecture = "MistralForCausalLM";
}

}  // namespace

ModelConfig read_gguf_config(const io::GgufFile& file) {
  const auto arch = file.get_string("general.architecture");
  ModelConfig c;
  c.model_type = arch;
  if (arch == "llama")
    c.architecture = "LlamaForCausalLM";
  else if (arch == "qwen2")
    c.architecture = "Qwen2ForCausalLM";
  else if (arch == "qwen3")
    c.architecture = "Qwen3ForCausalLM";
  else
    throw Error(
        "gguf",
        fmt::format("architecture '{}' is not supported; supported: llama, qwen2, qwen3", arch));
  if (file.has(arch + ".expert_count") && file.get_u32(arch + ".expert_count") > 0)
    throw Error("gguf", "mixtures of experts are not supported");
  const auto* table = file.find("token_embd.weight");
  if (!table || table->shape.size() != 2)
    throw Error("gguf", "the matrix 'token_embd.weight' is missing");
  c.vocab_size = table->shape[0];
  c.num_hidden_layers = file.get_u32(arch + ".block_count");
  c.max_position_embeddings = file.get_u32(arch + ".context_length");
  c.hidden_size = file.get_u32(arch + ".embedding_length");
  c.intermediate_size = size_of(file, arch + ".feed_forward_length");
  c.num_attention_heads = size_of(file, arch + ".attention.head_count");
  if (c.num_attention_heads < 1 || c.hidden_size < 1)
    throw Error("gguf", "a model has heads and a width");
  c.num_key_value_heads = file.has(arch + ".attention.head_count_kv")
                              ? size_of(file, arch + ".attention.head_count_kv")
                              : c.num_attention_heads;
  if (c.num_key_value_heads < 1 || c.num_attention_heads % c.num_key_value_heads != 0)
    throw Error("gguf", fmt::format("{} heads are not a multiple of {} key/value heads",
                                    c.num_attention_heads, c.num_key_value_heads));
  const auto key = arch + ".attention.key_length";
  c.head_dim = file.has(key) ? file.get_u32(key) : c.hidden_size / c.num_attention_heads;
  if (file.get_u32(arch + ".attention.value_length", static_cast<uint32_t>(c.head_dim)) !=
      c.head_dim)
    throw Error("gguf", "value heads of another size than key heads are not supported");
  if (c.head_dim < 2 || c.head_dim % 2 != 0)
    throw Error("gguf",
                fmt::format("a head has an even number of dimensions, found {}", c.head_dim));
  c.rms_norm_eps = file.get_f32(arch + ".attention.layer_norm_rms_epsilon");
  c.attention_bias = file.find("blk.0.attn_q.bias") != nullptr;
  c.attention_out_bias = file.find("blk.0.attn_output.bias") != nullptr;
  c.mlp_bias = file.find("blk.0.ffn_up.bias") != nullptr;
  c.qk_norm = arch == "qwen3";
  c.tie_word_embeddings = file.find("output.weight") == nullptr;
  c.rope = read_rope(file, arch, c.max_position_embeddings, c.head_dim);
  read_windows(file, arch, c);
  c.bos_token_id = token_id(file, "bos_token_id");
  c.pad_token_id = token_id(file, "padding_token_id");
  for (const char* name : {"eos_token_id", "eot_token_id"})
    if (const auto id = token_id(file, name); id && std::ranges::count(c.eos_token_id, *id) == 0)
      c.eos_token_id.push_back(*id);
  return c;
}

namespace {

uint32_t as_u32(int64_t value, const char* what) {
  if (value < 0 || value > UINT32_MAX)
    throw Error("save_gguf", fmt::format("{} is {}, which does not fit 32 bits", what, value));
  return static_cast<uint32_t>(value);
}

// Llama 3's blend of frequencies has no key: the divisors of the plain ones are a tensor.
std::vector<float> rope_divisors(const ModelConfig& c) {
  if (c.rope.type != "llama3") return c.rope.frequency_divisors;
  RopeConfig plain;
  plain.theta = c.rope.theta;
  const auto ratio = RotaryTable(plain, c.head_dim).inverse_frequencies().to(at::kDouble) /
                     RotaryTable(c.rope, c.head_dim).inverse_frequencies().to(at::kDouble);
  const auto values = ratio.to(at::kFloat).contiguous();
  const auto* data = values.const_data_ptr<float>();
  return {data, data + values.numel()};
}

void add_scaling(GgufConfig& out, const RopeConfig& rope) {
  const auto key = [&](const char* name) { return out.architecture + ".rope.scaling." + name; };
  if (rope.type == "default" || rope.type == "llama3") return;
  out.keys.emplace_back(key("type"), rope.type);
  out.keys.emplace_back(key("factor"), static_cast<float>(rope.factor));
  if (rope.type != "yarn") return;
  out.keys.emplace_back(key("original_context_length"),
                        as_u32(rope.original_max_position, "original_max_position_embeddings"));
  if (!rope.truncate)
    throw Error("save_gguf", "rope scaling 'yarn' with truncate = false has no key in a GGUF file");
  if (rope.beta_fast != 32.0)
    out.keys.emplace_back(key("yarn_beta_fast"), static_cast<float>(rope.beta_fast));
  if (rope.beta_slow != 1.0)
    out.keys.emplace_back(key("yarn_beta_slow"), static_cast<float>(rope.beta_slow));
  const double attention = RotaryTable(rope, 2).attention_factor() / default_attention_factor(rope);
  if (std::abs(attention - 1) > 1e-9)
    out.keys.emplace_back(key("attn_factor"), static_cast<float>(attention));
}

void add_windows(GgufConfig& out, const ModelConfig& c) {
  int64_t window = 0;
  std::vector<bool> pattern;
  for (const int64_t w : c.sliding_window) {
    if (w > 0 && window > 0 && w != window)
      throw Error("save_gguf",
                  fmt::format("layers have windows of {} and {} tokens, one is wanted", window, w));
    window = std::max(window, w);
    pattern.push_back(w > 0);
  }
  if (window == 0) return;
  const auto key = out.architecture + ".attention.sliding_window";
  out.keys.emplace_back(key, as_u32(window, "sliding_window"));
  out.keys.emplace_back(key + "_pattern", io::GgufArray(pattern));
  out.warnings.push_back(fmt::format(
      "the sliding window of {} tokens is written, but llama.cpp and transformers ignore it in "
      "files "
      "of architecture {}: beyond {} tokens they attend to more than the model was made for",
      window, out.architecture, window));
}

}  // namespace

GgufConfig gguf_config(const ModelConfig& c) {
  GgufConfig out;
  out.architecture = c.model_type == "mistral" ? "llama" : c.model_type;
  if (out.architecture != "llama" && out.architecture != "qwen2" && out.architecture != "qwen3")
    throw Error("save_gguf",
                fmt::format("a model of type '{}' has no architecture here; supported: llama, "
                            "mistral, qwen2, qwen3",
                            c.model_type));
  const auto size = [&](const char* name, int64_t value) {
    out.keys.emplace_back(out.architecture + name, as_u32(value, name));
  };
  const auto real = [&](const char* name, double value) {
    out.keys.emplace_back(out.architecture + name, static_cast<float>(value));
  };
  size(".vocab_size", c.vocab_size);
  size(".block_count", c.num_hidden_layers);
  size(".context_length", c.max_position_embeddings);
  size(".embedding_length", c.hidden_size);
  size(".feed_forward_length", c.intermediate_size);
  size(".attention.head_count", c.num_attention_heads);
  size(".attention.head_count_kv", c.num_key_value_heads);
  size(".attention.key_length", c.head_dim);
  size(".attention.value_length", c.head_dim);
  real(".attention.layer_norm_rms_epsilon", c.rms_norm_eps);
  size(".rope.dimension_count", c.head_dim);
  real(".rope.freq_base", c.rope.theta);
  add_scaling(out, c.rope);
  add_windows(out, c);
  out.rope_divisors = rope_divisors(c);
  return out;
}

}  // namespace budwood::models
