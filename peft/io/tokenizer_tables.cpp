#include <budwood/peft/io/gguf_tokenizer.h>
#include <budwood/peft/io/tokenizer_tables.h>

#include <nlohmann/json.hpp>

namespace budwood::io {
namespace {

using Json = nlohmann::ordered_json;

// Regular expressions of the models' own tokenizer.json files, in the dialect of the Hugging Face
// tokenizers library.
constexpr const char* kLlama3Split =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|)"
    R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen2Split =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|)"
    R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
// llama.cpp's rule for files that say "default": four splits, one after another.
constexpr const char* kDefaultSplits[] = {
    R"([\p{P}\$\+<=>\^~\|]+)",
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)",
    R"(\p{N}+)",
    R"([0-9][0-9][0-9])",
};

// "smollm" and "starcoder" split off every digit before GPT-2's rule, although transformers' own
// conversion of GGUF files applies GPT-2's rule alone to them. The first name of a kind is written.
constexpr std::pair<std::string_view, PreTokenizer> kPreTokenizers[] = {
    {"smollm", PreTokenizer::digits_gpt2}, {"starcoder", PreTokenizer::digits_gpt2},
    {"gpt-2", PreTokenizer::gpt2},         {"llama-bpe", PreTokenizer::llama3},
    {"llama3", PreTokenizer::llama3},      {"llama-v3", PreTokenizer::llama3},
    {"qwen2", PreTokenizer::qwen2},        {"default", PreTokenizer::fallback},
};

Json byte_level(bool add_prefix_space, bool use_regex) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", add_prefix_space},
          {"trim_offsets", true},
          {"use_regex", use_regex}};
}

Json split(const char* regex) {
  return {{"type", "Split"},
          {"pattern", {{"Regex", regex}}},
          {"behavior", "Isolated"},
          {"invert", false}};
}

// The steps of a pre-tokeniser, with defaults filled in and without what changes no id.
nlohmann::json steps_of(const nlohmann::json& pre) {
  nlohmann::json steps = nlohmann::json::array();
  if (!pre.is_object()) return steps;
  const std::string type = pre.value("type", "");
  if (type == "Sequence" && pre.contains("pretokenizers")) {
    for (const auto& part : pre["pretokenizers"])
      for (const auto& step : steps_of(part)) steps.push_back(step);
    return steps;
  }
  auto step = pre;
  const auto assume = [&](const char* key, bool value) {
    if (!step.contains(key)) step[key] = value;
  };
  if (type == "ByteLevel") {
    assume("add_prefix_space", true);
    assume("use_regex", true);
    step.erase("trim_offsets");
  } else if (type == "Split") {
    assume("invert", false);
  } else if (type == "Digits") {
    assume("individual_digits", false);
  }
  steps.push_back(step);
  return steps;
}

}  // namespace

std::optional<PreTokenizer> pre_tokenizer_of(std::string_view name) {
  for (const auto& [known, pre] : kPreTokenizers)
    if (known == name) return pre;
  return std::nullopt;
}

std::vector<std::string> gguf_pre_tokenizers() {
  std::vector<std::string> names;
  for (const auto& [name, pre] : kPreTokenizers) names.emplace_back(name);
  return names;
}

Json pre_tokenizer_json(PreTokenizer pre, bool prefix_space) {
  Json steps = Json::array();
  switch (pre) {
    case PreTokenizer::gpt2:
      return byte_level(prefix_space, true);
    case PreTokenizer::digits_gpt2:
      steps.push_back({{"type", "Digits"}, {"individual_digits", true}});
      steps.push_back(byte_level(prefix_space, true));
      break;
    case PreTokenizer::llama3:
    case PreTokenizer::qwen2:
      steps.push_back(split(pre == PreTokenizer::llama3 ? kLlama3Split : kQwen2Split));
      steps.push_back(byte_level(prefix_space, false));
      break;
    case PreTokenizer::fallback:
      for (const char* regex : kDefaultSplits) steps.push_back(split(regex));
      steps.push_back(byte_level(prefix_space, false));
      break;
  }
  return {{"type", "Sequence"}, {"pretokenizers", steps}};
}

Json normalizer_json(PreTokenizer pre) {
  return pre == PreTokenizer::qwen2 ? Json{{"type", "NFC"}} : Json(nullptr);
}

bool ignores_merges(PreTokenizer pre) {
  return pre == PreTokenizer::llama3;
}

std::optional<NamedPreTokenizer> find_pre_tokenizer(const nlohmann::json& pre_tokenizer) {
  const auto steps = steps_of(pre_tokenizer);
  for (const auto& [name, pre] : kPreTokenizers)
    for (const bool prefix_space : {false, true})
      if (steps_of(nlohmann::json(pre_tokenizer_json(pre, prefix_space))) == steps)
        return NamedPreTokenizer{std::string(name), pre, prefix_space};
  return std::nullopt;
}

}  // namespace budwood::io
