#pragma once

#include <budwood/peft/methods/targeted_config.h>

namespace budwood {

/// What methods with virtual tokens have in common. What is not given is filled from the model.
struct VirtualTokensConfig : AdapterConfig {
  std::optional<int64_t> num_virtual_tokens;  ///< must be given
  std::optional<int64_t> token_dim, num_transformer_submodules, num_attention_heads, num_layers;

  void validate(Strictness strictness = Strictness::strict) const override;
  std::vector<ConfigField> fields() override;
  bool is_prompt_learning() const override { return true; }

 protected:
  using AdapterConfig::AdapterConfig;
};

/// Virtual tokens in the embedded input (arXiv 2104.08691).
struct PromptTuningConfig : VirtualTokensConfig {
  PromptTuningConfig() : VirtualTokensConfig("PROMPT_TUNING") {}

  std::string prompt_tuning_init = "RANDOM";  ///< or TEXT, SAMPLE_VOCAB
  std::optional<std::string> prompt_tuning_init_text, tokenizer_name_or_path;
  RawJson tokenizer_kwargs;
  /// Token ids of the initial text, for programs without a tokeniser; repeated or cut to
  /// num_virtual_tokens. With TEXT, either these or (in Python) the text.
  std::vector<int64_t> init_token_ids;
  std::string placement = "front";  ///< see placement.h; not HF PEFT's
  /// In an encoder: the tokens go among "words", and positions are counted with them, or among
  /// "embeddings", words with positions and after their norm (AdapterHub).
  std::string among = "words";

  void validate(Strictness strictness = Strictness::strict) const override;
  std::shared_ptr<AdapterConfig> clone() const override {
    return std::make_shared<PromptTuningConfig>(*this);
  }
  std::vector<ConfigField> fields() override;
};

/// P-tuning (arXiv 2103.10385): virtual tokens that a small encoder makes while they are trained.
struct PromptEncoderConfig : VirtualTokensConfig {
  PromptEncoderConfig() : VirtualTokensConfig("P_TUNING") {}

  std::string encoder_reparameterization_type = "MLP";  ///< or LSTM
  std::optional<int64_t> encoder_hidden_size;
  int64_t encoder_num_layers = 2;  ///< of the LSTM
  double encoder_dropout = 0.0;    ///< between the layers of the LSTM
  std::string placement = "front";

  void validate(Strictness strictness = Strictness::strict) const override;
  std::shared_ptr<AdapterConfig> clone() const override {
    return std::make_shared<PromptEncoderConfig>(*this);
  }
  std::vector<ConfigField> fields() override;
};

/// Prefix tuning (arXiv 2101.00190): learned keys and values before those of every layer.
struct PrefixTuningConfig : VirtualTokensConfig {
  PrefixTuningConfig() : VirtualTokensConfig("PREFIX_TUNING") {}

  bool prefix_projection = false;  ///< an MLP makes the table while it is trained
  std::optional<int64_t> encoder_hidden_size;
  std::optional<std::string> init_weights;  ///< nothing = N(0, 1), "zero"
  /// Width of what the MLP reads; nothing = that of a layer's keys. Not HF PEFT's.
  std::optional<int64_t> encoder_input_size;
  /// Positions of the tokens: "after" the prefix, or "own", as they are without it (AdapterHub).
  std::string positions = "after";
  /// A factor of each layer's prefix by sequence, the mean of sigmoid(G x) over its tokens x:
  /// "none", "shared" by keys and values, or "separate". Not HF PEFT's.
  std::string gating = "none";

  void validate(Strictness strictness = Strictness::strict) const override;
  std::shared_ptr<AdapterConfig> clone() const override {
    return std::make_shared<PrefixTuningConfig>(*this);
  }
  std::vector<ConfigField> fields() override;
};

/// LLaMA-Adapter (arXiv 2303.16199): gated attention to learned prompts in the top layers.
struct AdaptionPromptConfig : AdapterConfig {
  AdaptionPromptConfig() : AdapterConfig("ADAPTION_PROMPT") {}

  std::optional<std::string> target_modules;  ///< recorded: the attention modules are known
  std::optional<int64_t> adapter_len, adapter_layers;

  void validate(Strictness strictness = Strictness::strict) const override;
  std::shared_ptr<AdapterConfig> clone() const override {
    return std::make_shared<AdaptionPromptConfig>(*this);
  }
  std::vector<ConfigField> fields() override;
};

}  // namespace budwood
