#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

/// What GGUF files and Hugging Face's tokenizer.json say in different words about one byte-level
/// BPE tokeniser. Both directions read these tables.
namespace budwood::io {

// tokenizer.ggml.token_type
constexpr int32_t kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5;

/// Names of special tokens in tokenizer_config.json, and in "tokenizer.ggml.<name>".
constexpr std::pair<const char*, const char*> kSpecialTokens[] = {
    {"bos_token", "bos_token_id"},     {"eos_token", "eos_token_id"},
    {"unk_token", "unknown_token_id"}, {"sep_token", "seperator_token_id"},
    {"pad_token", "padding_token_id"}, {"cls_token", "cls_token_id"},
    {"mask_token", "mask_token_id"}};

/// How text is split before merges apply; tokenizer.ggml.pre names it.
enum class PreTokenizer { gpt2, digits_gpt2, llama3, qwen2, fallback };

/// Of a value of tokenizer.ggml.pre.
std::optional<PreTokenizer> pre_tokenizer_of(std::string_view name);

/// The parts of tokenizer.json that it stands for.
nlohmann::ordered_json pre_tokenizer_json(PreTokenizer pre, bool prefix_space);
nlohmann::ordered_json normalizer_json(PreTokenizer pre);
/// Whether a piece of text that is a token is taken whole, without merges.
bool ignores_merges(PreTokenizer pre);

struct NamedPreTokenizer {
  std::string name;  ///< for tokenizer.ggml.pre
  PreTokenizer pre;
  bool prefix_space;
};
/// The name of a tokenizer.json's "pre_tokenizer"; nothing when no name stands for it. Settings
/// that do not change ids are not compared.
std::optional<NamedPreTokenizer> find_pre_tokenizer(const nlohmann::json& pre_tokenizer);

}  // namespace budwood::io
