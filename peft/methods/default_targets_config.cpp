#include <budwood/peft/targets.h>

#include <algorithm>

namespace budwood {
namespace {

// target_modules by model type, as in HF PEFT 0.21. IA3's last column is its feed-forward part.
struct Defaults {
  std::string_view models, lora, ia3, feedforward, adalora;
};
constexpr std::string_view kGemma4 = ".*language_model\\..*\\.(q_proj|v_proj)";
// clang-format off
constexpr Defaults kDefaults[] = {
    {"llama", "q_proj v_proj", "k_proj v_proj down_proj", "down_proj", "q_proj v_proj"},
    {"mistral", "q_proj v_proj", "k_proj v_proj down_proj", "down_proj", ""},
    {"mixtral", "q_proj v_proj", "k_proj v_proj w2", "w2", ""},
    {"qwen2 qwen3 gemma gemma2 gemma3_text llama4",
     "q_proj v_proj", "q_proj v_proj down_proj", "down_proj", "q_proj v_proj"},
    {"gemma4", kGemma4, "", "", kGemma4},
    {"phi", "q_proj v_proj fc1 fc2", "q_proj v_proj fc2", "fc2", ""},
    {"gpt2 gpt_bigcode", "c_attn", "c_attn mlp.c_proj", "mlp.c_proj", "c_attn"},
    {"gpt_neox", "query_key_value", "query_key_value dense_4h_to_h", "dense_4h_to_h", "query_key_value"},
    {"gpt_neo", "q_proj v_proj", "q_proj v_proj c_proj", "c_proj", "q_proj v_proj"},
    {"gptj", "q_proj v_proj", "q_proj v_proj fc_out", "fc_out", "q_proj v_proj"},
    {"opt", "q_proj v_proj", "q_proj k_proj fc2", "fc2", "q_proj k_proj v_proj out_proj fc1 fc2"},
    {"bloom", "query_key_value", "query_key_value mlp.dense_4h_to_h", "mlp.dense_4h_to_h", "query_key_value"},
    {"falcon RefinedWeb RefinedWebModel",
     "query_key_value", "query_key_value dense_4h_to_h", "dense_4h_to_h", ""},
    {"bert", "query value", "key value output.dense", "output.dense", "query value"},
    {"roberta", "query value", "key value output.dense", "output.dense", "query key value dense"},
    {"xlm-roberta electra layoutlm", "query value", "", "", ""},
    {"deberta-v2", "query_proj value_proj", "key_proj value_proj output.dense", "output.dense",
     "query_proj key_proj value_proj dense"},
    {"deberta", "in_proj", "in_proj output.dense", "output.dense", "in_proj"},
    {"t5", "q v", "k v wo", "wo", "q k v o wi wo"},
    {"mt5", "q v", "k v wi_1", "", "q k v o wi_0 wi_1 wo"},
    {"bart", "q_proj v_proj", "q_proj v_proj fc2", "fc2", "q_proj k_proj v_proj out_proj fc1 fc2"},
    {"blip-2", "q v q_proj v_proj", "", "", ""},
    {"chatglm", "query_key_value", "", "", ""},
    {"mpt", "Wqkv", "", "", ""},
    {"btlm", "c_proj c_attn", "", "", ""},
    {"codegen", "qkv_proj", "", "", ""},
    {"stablelm", "q_proj v_proj", "", "", ""},
    {"nemotron_h", "q_proj k_proj v_proj o_proj", "", "", "q_proj k_proj v_proj o_proj"},
    {"rwkv", "key value receptance output", "", "", ""},
    {"rwkv7", "r_proj k_proj v_proj o_proj key value", "", "", ""},
};
// clang-format on

std::vector<std::string> words(std::string_view text) {
  std::vector<std::string> list;
  while (!text.empty()) {
    const size_t end = std::min(text.find(' '), text.size());
    list.emplace_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return list;
}

const Defaults* defaults_of(std::string_view model_type) {
  for (const auto& row : kDefaults)
    for (const auto& name : words(row.models))
      if (name == model_type) return &row;
  return nullptr;
}

}  // namespace

std::optional<Names> default_target_modules(std::string_view peft_type,
                                            std::string_view model_type) {
  const auto* row = defaults_of(model_type);
  if (!row) return {};
  const bool as_lora = peft_type == "LORA" || peft_type == "VERA" || peft_type == "DYLORA";
  const auto text = as_lora                  ? row->lora
                    : peft_type == "IA3"     ? row->ia3
                    : peft_type == "ADALORA" ? row->adalora
                                             : std::string_view();
  if (text.empty()) return {};
  if (text == kGemma4) return std::string(text);
  return words(text);
}

std::optional<std::vector<std::string>> default_feedforward_modules(std::string_view model_type) {
  const auto* row = defaults_of(model_type);
  if (!row || row->ia3.empty()) return {};
  return words(row->feedforward);
}

}  // namespace budwood
