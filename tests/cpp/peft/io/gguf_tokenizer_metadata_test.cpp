#include <budwood/peft/io/gguf_tokenizer.h>
#include <budwood/peft/io/text.h>
#include <budwood/peft/io/tokenizer_tables.h>
#include <budwood/quant/error.h>
#include <doctest/doctest.h>

#include <nlohmann/json.hpp>

#include "temporary_folder.h"

using namespace budwood;
using namespace budwood::io;
using namespace budwood::io::testing;
using nlohmann::json;

namespace {

using Texts = std::vector<std::string>;

// A folder as Hugging Face writes it: the letters of "hat", two merges, added tokens.
json tokenizer() {
  return json::parse(R"({
    "version": "1.0",
    "added_tokens": [{"id": 0, "content": "<s>", "special": true},
                     {"id": 1, "content": "</s>", "special": true},
                     {"id": 8, "content": "<tool>", "special": false}],
    "normalizer": null,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false},
    "post_processor": null,
    "model": {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "h": 2, "a": 3, "t": 4, "Ġ": 5, "at": 6,
                                       "hat": 7},
              "merges": [["a", "t"], ["h", "at"]]}})");
}

json config() {
  return json::parse(
      R"({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": null})");
}

struct Made {
  TemporaryFolder folder;
  Made(const json& tokenizer, const json& config) {
    write_file(folder / "tokenizer.json", tokenizer.dump());
    write_file(folder / "tokenizer_config.json", config.dump());
  }
  TokenizerMetadata read(int64_t vocabulary = 9) const {
    return tokenizer_metadata(folder / "", vocabulary);
  }
};

TokenizerMetadata metadata_of(const json& tokenizer, const json& config = ::config(),
                              int64_t vocabulary = 9) {
  return Made(tokenizer, config).read(vocabulary);
}

std::string refusal(const json& tokenizer, const json& config = ::config()) {
  return message_of<Error>([&] { metadata_of(tokenizer, config); });
}

const GgufValue* find(const GgufMetadata& keys, const std::string& name) {
  for (const auto& [key, value] : keys)
    if (key == name) return &value;
  return nullptr;
}

const GgufValue& value(const TokenizerMetadata& metadata, const std::string& name) {
  const auto* found = find(metadata.keys, "tokenizer." + name);
  REQUIRE_MESSAGE(found, name);
  return *found;
}

template <typename T>
T get(const TokenizerMetadata& metadata, const std::string& name) {
  return std::get<T>(value(metadata, name));
}

template <typename T>
std::vector<T> list(const TokenizerMetadata& metadata, const std::string& name) {
  return std::get<std::vector<T>>(std::get<GgufArray>(value(metadata, name)));
}

}  // namespace

TEST_CASE("a folder's vocabulary, kinds of tokens and merges become metadata") {
  const auto m = metadata_of(tokenizer());
  CHECK(get<std::string>(m, "ggml.model") == "gpt2");
  CHECK(get<std::string>(m, "ggml.pre") == "gpt-2");
  CHECK(list<std::string>(m, "ggml.tokens") ==
        Texts{"<s>", "</s>", "h", "a", "t", "\xc4\xa0", "at", "hat", "<tool>"});
  CHECK(list<int32_t>(m, "ggml.token_type") == std::vector<int32_t>{3, 3, 1, 1, 1, 1, 1, 1, 4});
  CHECK(list<std::string>(m, "ggml.merges") == Texts{"a t", "h at"});
  CHECK(get<uint32_t>(m, "ggml.bos_token_id") == 0);
  CHECK(get<uint32_t>(m, "ggml.eos_token_id") == 1);
  CHECK(!find(m.keys, "tokenizer.ggml.unknown_token_id"));
  CHECK(get<bool>(m, "ggml.add_bos_token") == false);
  CHECK(m.warnings.empty());
  auto old = tokenizer();
  old["model"]["merges"] = {"a t", "h at"};
  CHECK(list<std::string>(metadata_of(old), "ggml.merges") == Texts{"a t", "h at"});
}

TEST_CASE("rows without a token get placeholders, tokens without a row are refused") {
  const auto m = metadata_of(tokenizer(), config(), 11);
  CHECK(list<std::string>(m, "ggml.tokens")[10] == "[PAD10]");
  CHECK(list<int32_t>(m, "ggml.token_type")[10] == 5);
  CHECK(contains(message_of<Error>([&] { metadata_of(tokenizer(), config(), 8); }),
                 "the token '<tool>' has the id 8, but the model's token table has 8 rows"));
  auto twice = tokenizer();
  twice["model"]["vocab"]["x"] = 3;
  CHECK(contains(refusal(twice), "have both the id 3"));
}

TEST_CASE("every pre-tokeniser that is written is found again under its first name") {
  const std::map<std::string, std::string> first = {
      {"starcoder", "smollm"}, {"llama3", "llama-bpe"}, {"llama-v3", "llama-bpe"}};
  for (const auto& name : gguf_pre_tokenizers())
    for (const bool prefix_space : {false, true}) {
      const auto pre = pre_tokenizer_of(name);
      REQUIRE(pre);
      const auto found = find_pre_tokenizer(json(pre_tokenizer_json(*pre, prefix_space)));
      REQUIRE(found);
      CHECK(found->name == (first.contains(name) ? first.at(name) : name));
      CHECK(found->pre == *pre);
      CHECK(found->prefix_space == prefix_space);
    }
  // As Qwen2's and Llama 3's own files spell it.
  const auto qwen = json::parse(R"({"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
     "behavior": "Isolated", "invert": false},
    {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}]})");
  CHECK(find_pre_tokenizer(qwen)->name == "qwen2");
}

TEST_CASE("a splitting that no name stands for is refused, also in part") {
  auto t = tokenizer();
  t["pre_tokenizer"] = {{"type", "Whitespace"}};
  CHECK(contains(refusal(t), R"(pre-tokeniser {"type":"Whitespace"}; known are smollm)"));
  CHECK(contains(refusal(t), "leave tokenizer_from empty"));
  t = tokenizer();
  t["normalizer"] = {{"type", "NFC"}};
  CHECK(contains(refusal(t), "that of 'gpt-2', whose normaliser is null"));
  t = tokenizer();
  t["model"]["ignore_merges"] = true;
  CHECK(contains(refusal(t), "'gpt-2', which has ignore_merges false, found true"));
}

TEST_CASE("tokenisers of other kinds are refused with what was found") {
  auto t = tokenizer();
  t["model"]["type"] = "Unigram";
  CHECK(contains(refusal(t), "found a tokeniser of kind 'Unigram'"));
  t["model"]["type"] = "WordPiece";
  CHECK(contains(refusal(t), "found a tokeniser of kind 'WordPiece'"));
  t["model"] = tokenizer()["model"];
  t["model"]["byte_fallback"] = true;
  CHECK(contains(refusal(t), "fallback to bytes (SentencePiece)"));
  TemporaryFolder folder;
  const auto without = [&] {
    return message_of<Error>([&] { tokenizer_metadata(folder / "", 9); });
  };
  CHECK(contains(without(), "found no tokeniser"));
  write_file(folder / "vocab.txt", "a");
  CHECK(contains(without(), "found a WordPiece tokeniser (vocab.txt)"));
  CHECK(contains(message_of<Error>([&] { tokenizer_metadata(folder / "none", 9); }),
                 "no such folder"));
  const auto none = tokenizer_metadata("", 9);
  REQUIRE(none.keys.size() == 1);
  CHECK(get<std::string>(none, "ggml.model") == "no_vocab");
}

TEST_CASE("BOS and EOS are added as the folder says") {
  auto t = tokenizer();
  t["post_processor"] = json::parse(R"({"type": "Sequence", "processors": [
    {"type": "ByteLevel"},
    {"type": "TemplateProcessing",
     "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}]}]})");
  CHECK(get<bool>(metadata_of(t), "ggml.add_bos_token") == true);
  CHECK(get<bool>(metadata_of(t), "ggml.add_eos_token") == false);
  auto c = config();
  c["add_bos_token"] = false;
  c["add_eos_token"] = true;
  CHECK(get<bool>(metadata_of(t, c), "ggml.add_bos_token") == false);
  CHECK(get<bool>(metadata_of(t, c), "ggml.add_eos_token") == true);
  c = config();
  c["bos_token"] = "</s>";
  CHECK(contains(refusal(t, c), "the post-processor adds the token 0, which is not the bos_token"));
  c["bos_token"] = "<none>";
  CHECK(
      contains(refusal(tokenizer(), c), "'bos_token' is '<none>', which is not among the tokens"));
}

TEST_CASE("chat templates come from the configuration and from files beside it") {
  auto c = config();
  c["chat_template"] = "{{ x }}";
  Made made(tokenizer(), c);
  CHECK(get<std::string>(made.read(), "chat_template") == "{{ x }}");
  write_file(made.folder / "chat_template.jinja", "{{ y }}");
  CHECK(get<std::string>(made.read(), "chat_template") == "{{ y }}");
  c["chat_template"] = json::parse(R"([{"name": "default", "template": "{{ a }}"},
                                       {"name": "tool_use", "template": "{{ b }}"}])");
  const auto named = metadata_of(tokenizer(), c);
  CHECK(get<std::string>(named, "chat_template") == "{{ a }}");
  CHECK(get<std::string>(named, "chat_template.tool_use") == "{{ b }}");
  CHECK(list<std::string>(named, "chat_templates") == Texts{"tool_use"});
}

TEST_CASE("what a GGUF file cannot say of a token is a warning") {
  auto t = tokenizer();
  t["added_tokens"][2]["lstrip"] = true;
  CHECK(metadata_of(t).warnings ==
        Texts{"the token '<tool>' has 'lstrip', which a GGUF file cannot "
              "say"});
  auto c = config();
  c["added_tokens_decoder"] = json::parse(R"({"9": {"content": "<more>", "special": true}})");
  CHECK(list<std::string>(metadata_of(tokenizer(), c, 10), "ggml.tokens")[9] == "<more>");
}

TEST_CASE("a tokeniser goes from a GGUF file to a folder and back unchanged") {
  for (const std::string pre : {"gpt-2", "smollm", "llama-bpe", "qwen2", "default"}) {
    CAPTURE(pre);
    auto keys = metadata_of(tokenizer()).keys;
    for (auto& [key, value] : keys) {
      if (key == "tokenizer.ggml.pre") value = pre;
      if (key == "tokenizer.ggml.add_bos_token") value = true;
    }
    keys.emplace_back("tokenizer.chat_template", std::string("{{ x }}"));
    keys.emplace_back("general.name", std::string("not of the tokeniser"));
    TemporaryFolder folder;
    GgufWriter writer(folder / "x.gguf", keys, {});
    writer.commit();
    keys.pop_back();
    CHECK(tokenizer_metadata(folder / "x.gguf", 9).keys == keys);
    std::filesystem::create_directory(folder / "hf");
    write_tokenizer(GgufFile::open(folder / "x.gguf"), folder / "hf");
    CHECK(tokenizer_metadata(folder / "hf", 9).keys == keys);
  }
}

TEST_CASE("a GGUF file's tokeniser is stretched to the rows of the model, never cut") {
  auto keys = metadata_of(tokenizer()).keys;
  TemporaryFolder folder;
  GgufWriter writer(folder / "x.gguf", keys, {});
  writer.commit();
  const auto m = tokenizer_metadata(folder / "x.gguf", 12);
  CHECK(list<std::string>(m, "ggml.tokens").size() == 12);
  CHECK(list<int32_t>(m, "ggml.token_type")[11] == 5);
  CHECK(contains(message_of<Error>([&] { tokenizer_metadata(folder / "x.gguf", 8); }),
                 "9 tokens, but the model's token table has 8 rows"));
}
