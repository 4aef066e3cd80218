#include <budwood/peft/json.h>
#include <budwood/peft/methods/prompt_config.h>
#include <budwood/peft/placement.h>

#include <nlohmann/json.hpp>

namespace budwood {
namespace {

const bool registered[] = {
    register_config("PROMPT_TUNING", [] { return std::make_shared<PromptTuningConfig>(); }),
    register_config("P_TUNING", [] { return std::make_shared<PromptEncoderConfig>(); }),
    register_config("PREFIX_TUNING", [] { return std::make_shared<PrefixTuningConfig>(); }),
    register_config("ADAPTION_PROMPT", [] { return std::make_shared<AdaptionPromptConfig>(); })};

void add(std::vector<ConfigField>& all, std::vector<ConfigField> own) {
  for (auto& field : own) all.push_back(std::move(field));
}

ConfigField own_number(std::string name, std::optional<int64_t>& member) {
  auto field = bind_field(std::move(name), member);
  field.is_usual = [&member] { return !member; };
  return field;
}

ConfigField ids_field(std::string name, std::vector<int64_t>& ids) {
  return {std::move(name),
          [&](const Json& value) -> const char* {
            std::optional<std::vector<int64_t>> list;
            const auto* fault = read_value(value, list);
            if (!fault) ids = list.value_or(std::vector<int64_t>{});
            return fault;
          },
          [&]() -> Json { return ids; }, [&] { return ids.empty(); }};
}

}  // namespace

void VirtualTokensConfig::validate(Strictness strictness) const {
  AdapterConfig::validate(strictness);
  require_option(*this, num_virtual_tokens.has_value(), "num_virtual_tokens", "not given",
                 "given: how many virtual tokens there are");
  require_at_least(*this, "num_virtual_tokens", *num_virtual_tokens, 1);
  if (token_dim) require_at_least(*this, "token_dim", *token_dim, 1);
  if (num_layers) require_at_least(*this, "num_layers", *num_layers, 1);
  if (num_attention_heads) require_at_least(*this, "num_attention_heads", *num_attention_heads, 1);
  if (num_transformer_submodules)
    require_at_least(*this, "num_transformer_submodules", *num_transformer_submodules, 1);
}

std::vector<ConfigField> VirtualTokensConfig::fields() {
  auto all = AdapterConfig::fields();
  add(all,
      {bind_field("num_virtual_tokens", num_virtual_tokens), bind_field("token_dim", token_dim),
       bind_field("num_transformer_submodules", num_transformer_submodules),
       bind_field("num_attention_heads", num_attention_heads),
       bind_field("num_layers", num_layers)});
  return all;
}

void PromptTuningConfig::validate(Strictness strictness) const {
  VirtualTokensConfig::validate(strictness);
  require_one_of(*this, "prompt_tuning_init", prompt_tuning_init,
                 {"RANDOM", "TEXT", "SAMPLE_VOCAB"});
  require_one_of(*this, "among", among, {"words", "embeddings"});
  Placement::parse(placement, *num_virtual_tokens);
}

std::vector<ConfigField> PromptTuningConfig::fields() {
  auto all = VirtualTokensConfig::fields();
  add(all, {bind_field("prompt_tuning_init", prompt_tuning_init),
            bind_field("prompt_tuning_init_text", prompt_tuning_init_text),
            bind_field("tokenizer_name_or_path", tokenizer_name_or_path),
            bind_field("tokenizer_kwargs", tokenizer_kwargs),
            ids_field("init_token_ids", init_token_ids), own_text("placement", placement, "front"),
            own_text("among", among, "words")});
  return all;
}

void PromptEncoderConfig::validate(Strictness strictness) const {
  VirtualTokensConfig::validate(strictness);
  require_one_of(*this, "encoder_reparameterization_type", encoder_reparameterization_type,
                 {"MLP", "LSTM"});
  if (encoder_hidden_size) require_at_least(*this, "encoder_hidden_size", *encoder_hidden_size, 1);
  require_at_least(*this, "encoder_num_layers", encoder_num_layers, 1);
  require_probability(*this, "encoder_dropout", encoder_dropout);
  Placement::parse(placement, *num_virtual_tokens);
}

std::vector<ConfigField> PromptEncoderConfig::fields() {
  auto all = VirtualTokensConfig::fields();
  add(all,
      {bind_field("encoder_reparameterization_type", encoder_reparameterization_type),
       bind_field("encoder_hidden_size", encoder_hidden_size),
       bind_field("encoder_num_layers", encoder_num_layers),
       bind_field("encoder_dropout", encoder_dropout), own_text("placement", placement, "front")});
  return all;
}

void PrefixTuningConfig::validate(Strictness strictness) const {
  VirtualTokensConfig::validate(strictness);
  if (encoder_hidden_size) require_at_least(*this, "encoder_hidden_size", *encoder_hidden_size, 1);
  if (init_weights) require_one_of(*this, "init_weights", *init_weights, {"zero"});
  if (encoder_input_size) require_at_least(*this, "encoder_input_size", *encoder_input_size, 1);
  require_one_of(*this, "positions", positions, {"after", "own"});
  require_one_of(*this, "gating", gating, {"none", "shared", "separate"});
}

std::vector<ConfigField> PrefixTuningConfig::fields() {
  auto all = VirtualTokensConfig::fields();
  add(all, {bind_field("prefix_projection", prefix_projection),
            bind_field("encoder_hidden_size", encoder_hidden_size),
            bind_field("init_weights", init_weights),
            own_number("encoder_input_size", encoder_input_size),
            own_text("positions", positions, "after"), own_text("gating", gating, "none")});
  return all;
}

void AdaptionPromptConfig::validate(Strictness strictness) const {
  AdapterConfig::validate(strictness);
  require_option(*this, adapter_len.has_value(), "adapter_len", "not given",
                 "given: how many prompts a layer has");
  require_option(*this, adapter_layers.has_value(), "adapter_layers", "not given",
                 "given: how many of the top layers are adapted");
  require_at_least(*this, "adapter_len", *adapter_len, 1);
  require_at_least(*this, "adapter_layers", *adapter_layers, 1);
}

std::vector<ConfigField> AdaptionPromptConfig::fields() {
  auto all = AdapterConfig::fields();
  add(all, {bind_field("target_modules", target_modules), bind_field("adapter_len", adapter_len),
            bind_field("adapter_layers", adapter_layers)});
  return all;
}

}  // namespace budwood
