#include <fmt/format.h>

#include <budwood/peft/io/gguf_tokenizer.h>
#include <budwood/peft/models/gguf_metadata.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <optional>

namespace budwood::models {
namespace {

using io::GgmlType;

// Ids that the model's configuration knows and the tokeniser does not name.
void add_special_ids(io::GgufMetadata& keys, const ModelConfig& config,
                     std::vector<std::string>& warnings) {
  const auto find = [&](const std::string& name) -> std::optional<int64_t> {
    for (const auto& [key, value] : keys)
      if (const auto* id = std::get_if<uint32_t>(&value); id && key == "tokenizer.ggml." + name)
        return *id;
    return std::nullopt;
  };
  const auto add = [&](const std::string& name, int64_t id) {
    if (id >= 0 && id < config.vocab_size)
      keys.emplace_back("tokenizer.ggml." + name, static_cast<uint32_t>(id));
  };
  if (config.bos_token_id && !find("bos_token_id")) add("bos_token_id", *config.bos_token_id);
  if (config.pad_token_id && !find("padding_token_id"))
    add("padding_token_id", *config.pad_token_id);
  for (const int64_t id : config.eos_token_id) {
    const auto eos = find("eos_token_id"), eot = find("eot_token_id");
    if (id == eos || id == eot) continue;
    if (!eos)
      add("eos_token_id", id);
    else if (!eot)
      add("eot_token_id", id);
    else
      warnings.push_back(fmt::format(
          "the token {} ends a text too, but a GGUF file names two such tokens, {} and {}", id,
          *eos, *eot));
  }
}

}  // namespace

uint32_t gguf_file_type(GgmlType type) {
  switch (type) {
    case GgmlType::f32:
      return 0;
    case GgmlType::f16:
      return 1;
    case GgmlType::q4_0:
      return 2;
    case GgmlType::q4_1:
      return 3;
    case GgmlType::q8_0:
      return 7;
    case GgmlType::bf16:
      return 32;
    default:
      throw Error("gguf",
                  fmt::format("files of {} are not written", quant::kernels::ggml_type_name(type)));
  }
}

io::GgufMetadata gguf_metadata(const ModelConfig& config, const GgufConfig& described,
                               const GgufDescription& description,
                               std::vector<std::string>& warnings) {
  io::GgufMetadata keys = {{"general.architecture", described.architecture},
                           {"general.type", std::string("model")}};
  if (!description.name.empty()) keys.emplace_back("general.name", description.name);
  keys.emplace_back("general.file_type", gguf_file_type(description.type));
  if (description.blocks) keys.emplace_back("general.quantization_version", uint32_t{2});
  std::ranges::copy(described.keys, std::back_inserter(keys));
  auto tokenizer = io::tokenizer_metadata(description.tokenizer_from, config.vocab_size);
  std::ranges::move(tokenizer.warnings, std::back_inserter(warnings));
  std::ranges::move(tokenizer.keys, std::back_inserter(keys));
  add_special_ids(keys, config, warnings);
  return keys;
}

}  // namespace budwood::models
