#include <budwood/peft/io/gguf_tokenizer.h>
#include <budwood/peft/io/text.h>
#include <budwood/peft/io/tokenizer_tables.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <unordered_map>

namespace budwood::io {
namespace {

using Json = nlohmann::ordered_json;

Json byte_level_around(bool trim_offsets) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", true},
          {"trim_offsets", trim_offsets},
          {"use_regex", true}};
}

/// The tokeniser's metadata, checked.
class Source {
 public:
  explicit Source(const GgufFile& source)
      : file(source),
        path(file.path().string()),
        tokens(file.get_strings("tokenizer.ggml.tokens")) {
    const auto& model = file.get_string("tokenizer.ggml.model");
    if (model != "gpt2")
      refuse(
          fmt::format("a tokeniser of kind {}; supported is \"gpt2\" (byte-level BPE). Take the "
                      "tokeniser files of the original model instead",
                      in_quotes(model)));
    if (!file.has("tokenizer.ggml.pre"))
      refuse(
          "no key 'tokenizer.ggml.pre', so how text is to be split is not known; convert the "
          "model again with a current llama.cpp");
    pre = checked_pre(file.get_string("tokenizer.ggml.pre"));
    merges = &file.get_strings("tokenizer.ggml.merges");
    index_tokens();
    if (file.has("tokenizer.ggml.token_type"))
      types = file.get_integers("tokenizer.ggml.token_type");
    if (!types.empty() && types.size() != tokens.size())
      refuse(fmt::format("{} token types for {} tokens", types.size(), tokens.size()));
    bos = special("bos_token_id");
    eos = special("eos_token_id");
    add_bos = file.get_bool("tokenizer.ggml.add_bos_token", pre == PreTokenizer::llama3 && bos);
    add_eos = file.get_bool("tokenizer.ggml.add_eos_token", false);
    if (add_bos && !bos) refuse("BOS is to be added, but no key 'tokenizer.ggml.bos_token_id'");
    if (add_eos && !eos) refuse("EOS is to be added, but no key 'tokenizer.ggml.eos_token_id'");
  }

  [[noreturn]] void refuse(const std::string& fact) const {
    throw Error("tokenizer_files", fmt::format("{}: {}", path, fact));
  }

  /// The id under "tokenizer.ggml.<name>", if the file has one.
  std::optional<uint32_t> special(const std::string& name) const {
    const std::string key = "tokenizer.ggml." + name;
    if (!file.has(key)) return std::nullopt;
    const uint32_t id = file.get_u32(key);
    if (id >= tokens.size())
      refuse(fmt::format("{} is {}, there are {} tokens", key, id, tokens.size()));
    return id;
  }

  bool knows(std::string_view token) const { return ids.contains(token); }

  const GgufFile& file;
  const std::string path;
  const std::vector<std::string>& tokens;
  const std::vector<std::string>* merges = nullptr;
  std::vector<int64_t> types;
  PreTokenizer pre = PreTokenizer::gpt2;
  std::optional<uint32_t> bos, eos;
  bool add_bos = false, add_eos = false;

 private:
  PreTokenizer checked_pre(const std::string& name) const {
    if (const auto known = pre_tokenizer_of(name)) return *known;
    refuse(
        fmt::format("the pre-tokeniser {} (tokenizer.ggml.pre); supported are {}. Take the "
                    "tokeniser files of the original model instead",
                    in_quotes(name), fmt::join(gguf_pre_tokenizers(), ", ")));
  }

  void index_tokens() {
    ids.reserve(tokens.size());
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (!is_utf8(tokens[i]))
        refuse(fmt::format("token {} ({}) is not valid UTF-8", i, in_quotes(tokens[i])));
      const auto [it, fresh] = ids.emplace(tokens[i], i);
      if (!fresh)
        refuse(fmt::format("tokens {} and {} are both {}", it->second, i, in_quotes(tokens[i])));
    }
  }

  std::unordered_map<std::string_view, size_t> ids;
};

std::string json_text(std::string_view text) {
  return nlohmann::json(text).dump();
}

// {"token": id, ...}: written directly, as there may be hundreds of thousands.
std::string vocab_json(const Source& source) {
  std::string out = "{";
  for (size_t i = 0; i < source.tokens.size(); ++i)
    out += fmt::format("{}{}:{}", i > 0 ? "," : "", json_text(source.tokens[i]), i);
  return out + "}";
}

// [["a","b"], ...] from "a b".
std::string merges_json(const Source& source) {
  std::string out = "[";
  for (size_t i = 0; i < source.merges->size(); ++i) {
    const std::string& merge = (*source.merges)[i];
    const auto space = merge.find(' ', 1);
    if (space == std::string::npos || space + 1 == merge.size())
      source.refuse(fmt::format("merge {} is {}, two tokens with a space between are needed", i,
                                in_quotes(merge)));
    const std::string left = merge.substr(0, space), right = merge.substr(space + 1);
    for (const auto& token : {left, right, left + right})
      if (!source.knows(token))
        source.refuse(fmt::format("merge {} is {}, but {} is not among the tokens", i,
                                  in_quotes(merge), in_quotes(token)));
    out += fmt::format("{}[{},{}]", i > 0 ? "," : "", json_text(left), json_text(right));
  }
  return out + "]";
}

Json added_tokens(const Source& source) {
  Json list = Json::array();
  for (size_t i = 0; i < source.types.size(); ++i) {
    const int64_t type = source.types[i];
    if ((type != kControl && type != kUserDefined && type != kUnknown) || source.tokens[i].empty())
      continue;
    list.push_back({{"id", i},
                    {"content", source.tokens[i]},
                    {"single_word", false},
                    {"lstrip", false},
                    {"rstrip", false},
                    {"normalized", false},
                    {"special", type != kUserDefined}});
  }
  return list;
}

// What is put around a text, or around a pair of texts.
Json post_processor(const Source& source) {
  if (!source.add_bos && !source.add_eos) return byte_level_around(false);
  Json single = Json::array(), pair = Json::array(), specials = Json::object();
  const auto special = [&](Json& list, uint32_t id, int type_id) {
    const std::string& token = source.tokens[id];
    list.push_back({{"SpecialToken", {{"id", token}, {"type_id", type_id}}}});
    specials[token] = {{"id", token}, {"ids", {id}}, {"tokens", {token}}};
  };
  const auto sequence = [&](Json& list, const char* name, int type_id) {
    if (source.add_bos) special(list, *source.bos, type_id);
    list.push_back({{"Sequence", {{"id", name}, {"type_id", type_id}}}});
    if (source.add_eos) special(list, *source.eos, type_id);
  };
  sequence(single, "A", 0);
  sequence(pair, "A", 0);
  sequence(pair, "B", 1);
  return {{"type", "TemplateProcessing"},
          {"single", single},
          {"pair", pair},
          {"special_tokens", specials}};
}

std::string tokenizer_json(const Source& source) {
  const bool prefix_space = source.file.get_bool("tokenizer.ggml.add_space_prefix", false);
  // The model comes last, so that its two long parts can be appended as text.
  Json head = {{"version", "1.0"},
               {"truncation", nullptr},
               {"padding", nullptr},
               {"added_tokens", added_tokens(source)},
               {"normalizer", normalizer_json(source.pre)},
               {"pre_tokenizer", pre_tokenizer_json(source.pre, prefix_space)},
               {"post_processor", post_processor(source)},
               {"decoder", byte_level_around(true)}};
  Json model = {{"type", "BPE"},
                {"dropout", nullptr},
                {"unk_token", nullptr},
                {"continuing_subword_prefix", nullptr},
                {"end_of_word_suffix", nullptr},
                {"fuse_unk", false},
                {"byte_fallback", false},
                {"ignore_merges", ignores_merges(source.pre)}};
  std::string out = head.dump();
  out.back() = ',';
  out += "\"model\":" + model.dump();
  out.back() = ',';
  out += "\"vocab\":" + vocab_json(source) + ",\"merges\":" + merges_json(source) + "}}\n";
  return out;
}

Json special_tokens(const Source& source) {
  Json map = Json::object();
  for (const auto& [name, key] : kSpecialTokens)
    if (const auto id = source.special(key)) map[name] = source.tokens[*id];
  return map;
}

std::string checked_text(const Source& source, const std::string& key) {
  const std::string& text = source.file.get_string(key);
  if (!is_utf8(text)) source.refuse(fmt::format("the key {} is not valid UTF-8", in_quotes(key)));
  return text;
}

// One template, or a list when the file has further, named ones; null when it has none.
Json chat_template(const Source& source) {
  const std::string key = "tokenizer.chat_template";
  Json list = Json::array();
  if (source.file.has(key))
    list.push_back({{"name", "default"}, {"template", checked_text(source, key)}});
  for (const auto& [name, value] : source.file.metadata())
    if (name.starts_with(key + "."))
      list.push_back(
          {{"name", name.substr(key.size() + 1)}, {"template", checked_text(source, name)}});
  if (list.empty()) return nullptr;
  if (list.size() == 1 && list[0]["name"] == "default") return list[0]["template"];
  return list;
}

Json tokenizer_config(const Source& source) {
  Json config = {
      {"tokenizer_class", "PreTrainedTokenizerFast"},
      {"add_bos_token", source.add_bos},
      {"add_eos_token", source.add_eos},
      {"add_prefix_space", source.file.get_bool("tokenizer.ggml.add_space_prefix", false)},
      {"clean_up_tokenization_spaces", false}};
  config.update(special_tokens(source));
  const std::string length = source.file.get_string("general.architecture", "") + ".context_length";
  if (source.file.has(length)) config["model_max_length"] = source.file.get_u32(length);
  const Json chat = chat_template(source);
  if (!chat.is_null()) config["chat_template"] = chat;
  return config;
}

// Ids that generation needs; a turn ends at EOS or at the end-of-turn token.
Json generation_config(const Source& source) {
  Json config = Json::object();
  const auto eot = source.special("eot_token_id");
  if (source.bos) config["bos_token_id"] = *source.bos;
  if (source.eos && eot && *eot != *source.eos)
    config["eos_token_id"] = {*source.eos, *eot};
  else if (source.eos || eot)
    config["eos_token_id"] = source.eos ? *source.eos : *eot;
  if (const auto pad = source.special("padding_token_id")) config["pad_token_id"] = *pad;
  return config;
}

}  // namespace

std::map<std::string, std::string> tokenizer_files(const GgufFile& file) {
  const Source source(file);
  std::map<std::string, std::string> files;
  files["tokenizer.json"] = tokenizer_json(source);
  files["tokenizer_config.json"] = tokenizer_config(source).dump(2) + "\n";
  files["special_tokens_map.json"] = special_tokens(source).dump(2) + "\n";
  const Json generation = generation_config(source);
  if (!generation.empty()) files["generation_config.json"] = generation.dump(2) + "\n";
  return files;
}

void write_tokenizer(const GgufFile& file, const std::filesystem::path& folder) {
  for (const auto& [name, content] : tokenizer_files(file)) write_file(folder / name, content);
}

}  // namespace budwood::io
