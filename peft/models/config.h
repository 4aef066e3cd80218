#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace budwood::models {

/// Rotary position embedding, as transformers' `rope_parameters` names it.
struct RopeConfig {
  std::string type = "default";  ///< default, linear, llama3, yarn
  double theta = 10000.0;
  double factor = 1.0;
  double low_freq_factor = 1.0;   ///< llama3
  double high_freq_factor = 4.0;  ///< llama3
  int64_t original_max_position = 0;
  double beta_fast = 32.0;                                         ///< yarn
  double beta_slow = 1.0;                                          ///< yarn
  std::optional<double> attention_factor, mscale, mscale_all_dim;  ///< yarn
  bool truncate = true;                                            ///< yarn
  /// Divisors of the inverse frequencies [head_dim / 2] (GGUF's rope_freqs); empty = none.
  std::vector<float> frequency_divisors;
};

/// A decoder: of the Llama family (Llama, SmolLM2, Mistral, Qwen2, Qwen3), or GPT-2. Names are
/// transformers' of the former; what a model does not have keeps its value here.
struct ModelConfig {
  std::string model_type;    ///< llama, mistral, qwen2, qwen3, gpt2
  std::string architecture;  ///< LlamaForCausalLM, ...
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;
  int64_t head_dim = 0;
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;
  double layer_norm_eps = 1e-5;     ///< GPT-2
  std::string activation = "silu";  ///< GPT-2: gelu_new, gelu or relu
  RopeConfig rope;
  bool tie_word_embeddings = false;
  bool attention_bias = false;  ///< q, k, v (Qwen2: always)
  bool attention_out_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;  ///< RMS norm of q and k per head (Qwen3)
  /// Window of layer i in tokens, 0 = full attention.
  std::vector<int64_t> sliding_window;
  std::optional<int64_t> bos_token_id, pad_token_id;
  std::vector<int64_t> eos_token_id;
  /// `quantization_config` as JSON text: how the folder's matrices are packed. Empty = plain.
  std::string quantization;
  /// The file this was read from, kept so that keys Budwood has no use for survive a save.
  std::string source_json;

  /// Reads config.json's text. A missing key, an unknown architecture, rope type or activation is
  /// an Error that names it, never a guess.
  static ModelConfig from_json(const std::string& text);
  /// config.json's text, loadable by transformers. dtype: "float32", "bfloat16", "float16".
  /// quantization: as above, of the folder that is written.
  std::string to_json(const std::string& dtype, const std::string& quantization = "") const;
};

}  // namespace budwood::models
