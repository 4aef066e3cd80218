#include <fmt/format.h>

#include <budwood/peft/models/config.h>
#include <budwood/peft/models/rope.h>
#include <budwood/quant/error.h>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

namespace budwood::models {
namespace {

using Json = nlohmann::ordered_json;
constexpr const char* kWhere = "config.json";

[[noreturn]] void fail(const std::string& fact) {
  throw Error(kWhere, fact);
}

bool present(const Json& json, const char* key) {
  const auto it = json.find(key);
  return it != json.end() && !it->is_null();
}

const Json& required(const Json& json, const char* key) {
  if (!present(json, key)) fail(fmt::format("the key '{}' is missing", key));
  return json.at(key);
}

int64_t integer(const Json& value, const char* key) {
  if (!value.is_number_integer())
    fail(fmt::format("'{}' is an integer, found {}", key, value.dump()));
  return value.get<int64_t>();
}

int64_t positive(const Json& json, const char* key) {
  const int64_t value = integer(required(json, key), key);
  if (value < 1 || value > (int64_t{1} << 32))
    fail(fmt::format("'{}' is a positive size, found {}", key, value));
  return value;
}

double number(const Json& json, const char* key, double fallback) {
  if (!present(json, key)) return fallback;
  if (!json.at(key).is_number())
    fail(fmt::format("'{}' is a number, found {}", key, json.at(key).dump()));
  return json.at(key).get<double>();
}

bool flag(const Json& json, const char* key, bool fallback) {
  if (!present(json, key)) return fallback;
  if (!json.at(key).is_boolean())
    fail(fmt::format("'{}' is true or false, found {}", key, json.at(key).dump()));
  return json.at(key).get<bool>();
}

std::optional<double> optional_number(const Json& json, const char* key) {
  if (!present(json, key)) return {};
  return number(json, key, 0);
}

// What transformers' classes assume where a file is silent.
struct Family {
  const char* architecture;
  bool qkv_bias;
  bool out_bias_follows;
  bool qk_norm;
  bool bias_is_optional;   // attention_bias in the file decides
  int64_t default_window;  // when the key is absent
};

const std::map<std::string, Family>& families() {
  static const std::map<std::string, Family> table = {
      {"llama", {"LlamaForCausalLM", false, true, false, true, 0}},
      {"mistral", {"MistralForCausalLM", false, false, false, false, 4096}},
      {"qwen2", {"Qwen2ForCausalLM", true, false, false, false, 0}},
      {"qwen3", {"Qwen3ForCausalLM", false, true, true, true, 0}},
  };
  return table;
}

// transformers 5 writes rope_parameters, older files rope_theta and rope_scaling.
RopeConfig read_rope(const Json& json, int64_t max_position) {
  Json rope = Json::object();
  if (present(json, "rope_scaling")) rope = json.at("rope_scaling");
  if (present(json, "rope_parameters")) rope = json.at("rope_parameters");
  if (!rope.is_object()) fail("rope parameters are an object");
  RopeConfig r;
  r.theta = number(rope, "rope_theta", number(json, "rope_theta", 10000.0));
  if (present(rope, "rope_type"))
    r.type = rope.at("rope_type").get<std::string>();
  else if (present(rope, "type"))
    r.type = rope.at("type").get<std::string>();
  static const std::set<std::string> known = {"default", "linear", "llama3", "yarn"};
  if (!known.contains(r.type))
    fail(fmt::format("rope type '{}' is not supported; supported: default, linear, llama3, yarn",
                     r.type));
  if (number(rope, "partial_rotary_factor", number(json, "partial_rotary_factor", 1.0)) != 1.0)
    fail("partial_rotary_factor other than 1 is not supported");
  if (r.type == "default") return r;
  r.original_max_position = max_position;
  if (present(json, "original_max_position_embeddings"))
    r.original_max_position = positive(json, "original_max_position_embeddings");
  if (present(rope, "original_max_position_embeddings"))
    r.original_max_position = positive(rope, "original_max_position_embeddings");
  if (r.type == "yarn" && !present(rope, "factor"))
    r.factor = static_cast<double>(max_position) / static_cast<double>(r.original_max_position);
  else
    r.factor = number({{"factor", required(rope, "factor")}}, "factor", 1.0);
  if (r.factor <= 0) fail(fmt::format("the rope factor is positive, found {}", r.factor));
  if (r.type == "llama3") {
    required(rope, "low_freq_factor");
    required(rope, "high_freq_factor");
  }
  r.low_freq_factor = number(rope, "low_freq_factor", 1.0);
  r.high_freq_factor = number(rope, "high_freq_factor", 4.0);
  r.beta_fast = number(rope, "beta_fast", 32.0);
  r.beta_slow = number(rope, "beta_slow", 1.0);
  r.attention_factor = optional_number(rope, "attention_factor");
  r.mscale = optional_number(rope, "mscale");
  r.mscale_all_dim = optional_number(rope, "mscale_all_dim");
  r.truncate = flag(rope, "truncate", true);
  return r;
}

std::vector<int64_t> read_windows(const Json& json, const ModelConfig& c, int64_t default_window) {
  const auto layers = static_cast<size_t>(c.num_hidden_layers);
  int64_t window = json.contains("sliding_window") ? 0 : default_window;
  if (present(json, "sliding_window")) window = positive(json, "sliding_window");
  const bool qwen = c.model_type == "qwen2" || c.model_type == "qwen3";
  if (qwen && !flag(json, "use_sliding_window", false)) window = 0;
  if (c.model_type == "llama") window = 0;
  std::vector<int64_t> windows(layers, window);
  if (!qwen) return windows;
  if (present(json, "layer_types")) {
    const auto& types = json.at("layer_types");
    if (!types.is_array() || types.size() != layers)
      fail(fmt::format("'layer_types' has one entry per layer ({})", layers));
    for (size_t i = 0; i < layers; ++i) {
      const auto type = types[i].is_string() ? types[i].get<std::string>() : types[i].dump();
      if (type != "full_attention" && type != "sliding_attention")
        fail(fmt::format("layer type '{}' of layer {} is not supported", type, i));
      if (type == "full_attention")
        windows[i] = 0;
      else if (window == 0)
        fail("layer_types name sliding attention, but there is no window");
    }
    return windows;
  }
  const auto first = static_cast<size_t>(number(json, "max_window_layers", 28));
  for (size_t i = 0; i < std::min(first, layers); ++i) windows[i] = 0;
  return windows;
}

std::vector<int64_t> read_eos(const Json& json) {
  std::vector<int64_t> ids;
  if (!present(json, "eos_token_id")) return ids;
  const auto& value = json.at("eos_token_id");
  if (value.is_array())
    for (const auto& id : value) ids.push_back(integer(id, "eos_token_id"));
  else
    ids.push_back(integer(value, "eos_token_id"));
  return ids;
}

void check(const ModelConfig& c) {
  if (c.num_attention_heads % c.num_key_value_heads != 0)
    fail(fmt::format("num_attention_heads ({}) is not a multiple of num_key_value_heads ({})",
                     c.num_attention_heads, c.num_key_value_heads));
  if (c.head_dim % 2 != 0) fail(fmt::format("head_dim is even, found {}", c.head_dim));
}

void read_token_ids(const Json& json, ModelConfig& c) {
  if (present(json, "bos_token_id"))
    c.bos_token_id = integer(json.at("bos_token_id"), "bos_token_id");
  if (present(json, "pad_token_id"))
    c.pad_token_id = integer(json.at("pad_token_id"), "pad_token_id");
  c.eos_token_id = read_eos(json);
}

ModelConfig parse_gpt2(const Json& json) {
  ModelConfig c;
  c.model_type = "gpt2";
  c.architecture = "GPT2LMHeadModel";
  if (present(json, "quantization_config")) fail("a quantised GPT-2 folder is not supported");
  for (const char* key :
       {"scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"})
    if (flag(json, key, false)) fail(fmt::format("'{}' = true is not supported", key));
  if (!flag(json, "scale_attn_weights", true))
    fail("'scale_attn_weights' = false is not supported");
  c.activation = present(json, "activation_function")
                     ? json.at("activation_function").get<std::string>()
                     : "gelu_new";
  if (c.activation != "gelu_new" && c.activation != "gelu" && c.activation != "relu")
    fail(fmt::format("activation '{}' is not supported; supported: gelu_new, gelu, relu",
                     c.activation));
  c.vocab_size = positive(json, "vocab_size");
  c.hidden_size = positive(json, "n_embd");
  c.intermediate_size = present(json, "n_inner") ? positive(json, "n_inner") : 4 * c.hidden_size;
  c.num_hidden_layers = positive(json, "n_layer");
  c.num_attention_heads = c.num_key_value_heads = positive(json, "n_head");
  if (c.hidden_size % c.num_attention_heads != 0)
    fail(fmt::format("n_embd ({}) is not a multiple of n_head ({})", c.hidden_size,
                     c.num_attention_heads));
  c.head_dim = c.hidden_size / c.num_attention_heads;
  c.max_position_embeddings = positive(json, "n_positions");
  c.layer_norm_eps = number(json, "layer_norm_epsilon", 1e-5);
  c.tie_word_embeddings = flag(json, "tie_word_embeddings", true);
  c.attention_bias = c.attention_out_bias = c.mlp_bias = true;
  read_token_ids(json, c);
  return c;
}

ModelConfig parse(const Json& json) {
  if (!json.is_object()) fail("the file is not a JSON object");
  ModelConfig c;
  c.model_type = required(json, "model_type").get<std::string>();
  if (c.model_type == "gpt2") return parse_gpt2(json);
  const auto family = families().find(c.model_type);
  if (family == families().end())
    fail(
        fmt::format("model type '{}' is not supported; supported: llama, mistral, qwen2, qwen3, "
                    "gpt2",
                    c.model_type));
  c.architecture = family->second.architecture;
  if (present(json, "architectures") && !json.at("architectures").empty()) {
    const auto named = json.at("architectures").at(0).get<std::string>();
    if (named != c.architecture)
      fail(fmt::format("architecture '{}' is not supported; expected {}", named, c.architecture));
  }
  if (present(json, "quantization_config")) c.quantization = json.at("quantization_config").dump();
  if (present(json, "hidden_act") && json.at("hidden_act") != "silu")
    fail(fmt::format("activation {} is not supported; supported: silu",
                     json.at("hidden_act").dump()));
  c.vocab_size = positive(json, "vocab_size");
  c.hidden_size = positive(json, "hidden_size");
  c.intermediate_size = positive(json, "intermediate_size");
  c.num_hidden_layers = positive(json, "num_hidden_layers");
  c.num_attention_heads = positive(json, "num_attention_heads");
  if (!present(json, "num_key_value_heads") && c.model_type != "llama")
    fail("the key 'num_key_value_heads' is missing");
  c.num_key_value_heads = present(json, "num_key_value_heads")
                              ? positive(json, "num_key_value_heads")
                              : c.num_attention_heads;
  if (!present(json, "head_dim") && c.hidden_size % c.num_attention_heads != 0)
    fail(fmt::format(
        "hidden_size ({}) is not a multiple of num_attention_heads ({}) and there is no head_dim",
        c.hidden_size, c.num_attention_heads));
  // Qwen3's class has a head size of its own where the file is silent.
  c.head_dim = present(json, "head_dim") ? positive(json, "head_dim")
               : c.model_type == "qwen3" ? 128
                                         : c.hidden_size / c.num_attention_heads;
  c.max_position_embeddings = positive(json, "max_position_embeddings");
  required(json, "rms_norm_eps");
  c.rms_norm_eps = number(json, "rms_norm_eps", 1e-6);
  c.tie_word_embeddings = flag(json, "tie_word_embeddings", false);
  const bool bias = family->second.bias_is_optional && flag(json, "attention_bias", false);
  c.attention_bias = family->second.qkv_bias || bias;
  c.attention_out_bias = family->second.out_bias_follows && bias;
  c.mlp_bias = c.model_type == "llama" && flag(json, "mlp_bias", false);
  c.qk_norm = family->second.qk_norm;
  c.rope = read_rope(json, c.max_position_embeddings);
  c.sliding_window = read_windows(json, c, family->second.default_window);
  read_token_ids(json, c);
  check(c);
  return c;
}

Json rope_json(const RopeConfig& r) {
  Json rope = {{"rope_theta", r.theta}, {"rope_type", r.type}};
  if (r.type == "default") return rope;
  rope["factor"] = r.factor;
  if (r.type != "linear") rope["original_max_position_embeddings"] = r.original_max_position;
  if (r.type == "llama3") {
    rope["low_freq_factor"] = r.low_freq_factor;
    rope["high_freq_factor"] = r.high_freq_factor;
  }
  if (r.type == "yarn") {
    rope["beta_fast"] = r.beta_fast;
    rope["beta_slow"] = r.beta_slow;
    if (r.attention_factor) rope["attention_factor"] = *r.attention_factor;
    if (r.mscale) rope["mscale"] = *r.mscale;
    if (r.mscale_all_dim) rope["mscale_all_dim"] = *r.mscale_all_dim;
    rope["truncate"] = r.truncate;
  }
  return rope;
}

Json from_fields(const ModelConfig& c) {
  Json json = {{"architectures", {c.architecture}},
               {"attention_dropout", 0.0},
               {"bos_token_id", c.bos_token_id ? Json(*c.bos_token_id) : Json()},
               {"head_dim", c.head_dim},
               {"hidden_act", "silu"},
               {"hidden_size", c.hidden_size},
               {"initializer_range", 0.02},
               {"intermediate_size", c.intermediate_size},
               {"max_position_embeddings", c.max_position_embeddings},
               {"model_type", c.model_type},
               {"num_attention_heads", c.num_attention_heads},
               {"num_hidden_layers", c.num_hidden_layers},
               {"num_key_value_heads", c.num_key_value_heads},
               {"pad_token_id", c.pad_token_id ? Json(*c.pad_token_id) : Json()},
               {"rms_norm_eps", c.rms_norm_eps},
               {"rope_parameters", rope_json(llama3_of(c.rope, c.head_dim).value_or(c.rope))},
               {"use_cache", true},
               {"vocab_size", c.vocab_size}};
  if (c.eos_token_id.size() == 1)
    json["eos_token_id"] = c.eos_token_id[0];
  else if (!c.eos_token_id.empty())
    json["eos_token_id"] = c.eos_token_id;
  else
    json["eos_token_id"] = nullptr;
  if (c.model_type == "llama" || c.model_type == "qwen3") json["attention_bias"] = c.attention_bias;
  if (c.model_type == "llama") json["mlp_bias"] = c.mlp_bias;
  int64_t window = 0;
  for (const auto w : c.sliding_window) window = std::max(window, w);
  if (c.model_type == "mistral") json["sliding_window"] = window ? Json(window) : Json();
  if (c.model_type == "qwen2" || c.model_type == "qwen3") {
    json["use_sliding_window"] = window > 0;
    json["sliding_window"] = window ? Json(window) : Json();
    if (window) {
      Json types = Json::array();
      for (const auto w : c.sliding_window)
        types.push_back(w ? "sliding_attention" : "full_attention");
      json["layer_types"] = types;
    }
  }
  return json;
}

}  // namespace

ModelConfig ModelConfig::from_json(const std::string& text) {
  Json json;
  try {
    json = Json::parse(text);
    auto config = parse(json);
    config.source_json = text;
    return config;
  } catch (const nlohmann::json::exception& e) {
    fail(e.what());
  }
}

std::string ModelConfig::to_json(const std::string& dtype, const std::string& packed) const {
  Json json = source_json.empty() ? from_fields(*this) : Json::parse(source_json);
  json.erase("torch_dtype");
  json.erase("quantization_config");
  if (!packed.empty()) json["quantization_config"] = Json::parse(packed);
  json["dtype"] = dtype;
  json["tie_word_embeddings"] = tie_word_embeddings;
  json["vocab_size"] = vocab_size;
  // transformers keeps its keys sorted; an ordered object is sorted by passing through a plain one.
  return nlohmann::json::parse(json.dump()).dump(2) + "\n";
}

}  // namespace budwood::models
