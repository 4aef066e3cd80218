#include <budwood/peft/io/gguf_tokenizer.h>
#include <budwood/peft/io/text.h>
#include <budwood/quant/error.h>
#include <doctest/doctest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "temporary_folder.h"

using namespace budwood;
using namespace budwood::io;
using namespace budwood::io::testing;
using nlohmann::json;

namespace {

using Texts = std::vector<std::string>;

// The metadata of a tiny model: the letters of "hat", two merges, two control tokens.
GgufMetadata model(const std::string& pre) {
  return {
      {"general.architecture", std::string("llama")},
      {"llama.context_length", uint32_t{512}},
      {"tokenizer.ggml.model", std::string("gpt2")},
      {"tokenizer.ggml.pre", pre},
      {"tokenizer.ggml.tokens",
       GgufArray(Texts{"<s>", "</s>", "h", "a", "t", "\xc4\xa0", "at", "hat", "<tool>"})},
      {"tokenizer.ggml.token_type", GgufArray(std::vector<int32_t>{3, 3, 1, 1, 1, 1, 1, 1, 4})},
      {"tokenizer.ggml.merges", GgufArray(Texts{"a t", "h at"})},
      {"tokenizer.ggml.bos_token_id", uint32_t{0}},
      {"tokenizer.ggml.eos_token_id", uint32_t{1}},
      {"tokenizer.chat_template", std::string("{{ x }}")},
  };
}

GgufMetadata with(GgufMetadata metadata, const std::string& key, GgufValue value) {
  for (auto& [name, old] : metadata)
    if (name == key) {
      old = std::move(value);
      return metadata;
    }
  metadata.emplace_back(key, std::move(value));
  return metadata;
}

GgufMetadata without(GgufMetadata metadata, const std::string& key) {
  std::erase_if(metadata, [&](const auto& entry) { return entry.first == key; });
  return metadata;
}

std::map<std::string, std::string> files_of(const GgufMetadata& metadata) {
  TemporaryFolder folder;
  GgufWriter writer(folder / "x.gguf", metadata, {});
  writer.commit();
  return tokenizer_files(GgufFile::open(folder / "x.gguf"));
}

json file_of(const GgufMetadata& metadata, const std::string& name) {
  return parse_json(files_of(metadata).at(name), name);
}

std::string refusal(const GgufMetadata& metadata) {
  return message_of<Error>([&] { files_of(metadata); });
}

}  // namespace

TEST_CASE("vocabulary, merges and special tokens reach tokenizer.json with their ids") {
  const auto tokenizer = file_of(model("gpt-2"), "tokenizer.json");
  const auto& bpe = tokenizer["model"];
  CHECK(bpe["type"] == "BPE");
  CHECK(bpe["vocab"].size() == 9);
  CHECK(bpe["vocab"]["hat"] == 7);
  CHECK(bpe["vocab"]["\xc4\xa0"] == 5);
  CHECK(bpe["merges"] == json::parse(R"([["a","t"],["h","at"]])"));
  const auto& added = tokenizer["added_tokens"];
  REQUIRE(added.size() == 3);
  CHECK(added[0]["content"] == "<s>");
  CHECK(added[0]["special"] == true);
  CHECK(added[2]["id"] == 8);
  CHECK(added[2]["special"] == false);
  CHECK(tokenizer["decoder"]["type"] == "ByteLevel");
}

TEST_CASE("the settings files hold the special tokens, the length and the template") {
  const auto config = file_of(model("gpt-2"), "tokenizer_config.json");
  CHECK(config["bos_token"] == "<s>");
  CHECK(config["eos_token"] == "</s>");
  CHECK(config["model_max_length"] == 512);
  CHECK(config["chat_template"] == "{{ x }}");
  CHECK(config["add_bos_token"] == false);
  CHECK(file_of(model("gpt-2"), "special_tokens_map.json") ==
        json::parse(R"({"bos_token":"<s>","eos_token":"</s>"})"));
  CHECK(file_of(model("gpt-2"), "generation_config.json") ==
        json::parse(R"({"bos_token_id":0,"eos_token_id":1})"));
  const auto two_ends = with(model("gpt-2"), "tokenizer.ggml.eot_token_id", uint32_t{8});
  CHECK(file_of(two_ends, "generation_config.json")["eos_token_id"] == json::parse("[1,8]"));
  auto silent = without(model("gpt-2"), "tokenizer.ggml.bos_token_id");
  silent = without(silent, "tokenizer.ggml.eos_token_id");
  CHECK(!files_of(silent).contains("generation_config.json"));
  const auto named =
      with(model("gpt-2"), "tokenizer.chat_template.tool_use", std::string("{{ y }}"));
  CHECK(file_of(named, "tokenizer_config.json")["chat_template"] ==
        json::parse(R"([{"name":"default","template":"{{ x }}"},)"
                    R"({"name":"tool_use","template":"{{ y }}"}])"));
}

TEST_CASE("text is split as the model's own tokeniser splits it") {
  const auto pre = [](const std::string& name) {
    return file_of(model(name), "tokenizer.json")["pre_tokenizer"];
  };
  CHECK(pre("gpt-2")["type"] == "ByteLevel");
  CHECK(pre("gpt-2")["use_regex"] == true);
  const auto smollm = pre("smollm")["pretokenizers"];
  REQUIRE(smollm.size() == 2);
  CHECK(smollm[0] == json::parse(R"({"type":"Digits","individual_digits":true})"));
  CHECK(smollm[1] == pre("gpt-2"));
  const auto llama = pre("llama-bpe")["pretokenizers"];
  CHECK(
      llama[0]["pattern"]["Regex"] ==
      R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)");
  CHECK(llama[1]["use_regex"] == false);
  CHECK(
      pre("qwen2")["pretokenizers"][0]["pattern"]["Regex"] ==
      R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)");
  CHECK(pre("default")["pretokenizers"].size() == 5);
  CHECK(file_of(model("qwen2"), "tokenizer.json")["normalizer"]["type"] == "NFC");
  CHECK(file_of(model("gpt-2"), "tokenizer.json")["normalizer"].is_null());
  CHECK(file_of(model("llama-bpe"), "tokenizer.json")["model"]["ignore_merges"] == true);
  const auto prefixed = with(model("gpt-2"), "tokenizer.ggml.add_space_prefix", true);
  CHECK(file_of(prefixed, "tokenizer.json")["pre_tokenizer"]["add_prefix_space"] == true);
}

TEST_CASE("BOS and EOS are put around a text where the file says so") {
  const auto post = [](const GgufMetadata& metadata) {
    return file_of(metadata, "tokenizer.json")["post_processor"];
  };
  CHECK(post(model("gpt-2"))["type"] == "ByteLevel");
  auto both = with(model("gpt-2"), "tokenizer.ggml.add_bos_token", true);
  both = with(both, "tokenizer.ggml.add_eos_token", true);
  const auto around = post(both);
  CHECK(around["single"] == json::parse(R"([{"SpecialToken":{"id":"<s>","type_id":0}},)"
                                        R"({"Sequence":{"id":"A","type_id":0}},)"
                                        R"({"SpecialToken":{"id":"</s>","type_id":0}}])"));
  CHECK(around["pair"].size() == 6);
  CHECK(around["special_tokens"]["</s>"] ==
        json::parse(R"({"id":"</s>","ids":[1],"tokens":["</s>"]})"));
  CHECK(post(model("llama-bpe"))["single"].size() == 2);
  CHECK(post(with(model("llama-bpe"), "tokenizer.ggml.add_bos_token", false))["type"] ==
        "ByteLevel");
}

TEST_CASE("tokenisers of other kinds are refused with what is supported") {
  CHECK(contains(refusal(with(model("gpt-2"), "tokenizer.ggml.model", std::string("llama"))),
                 "a tokeniser of kind 'llama'; supported is \"gpt2\""));
  CHECK(contains(refusal(model("tekken")), "'tekken' (tokenizer.ggml.pre); supported are smollm"));
  CHECK(contains(refusal(without(model("gpt-2"), "tokenizer.ggml.pre")), "tokenizer.ggml.pre"));
  CHECK(contains(refusal(without(model("gpt-2"), "tokenizer.ggml.tokens")),
                 "has no key 'tokenizer.ggml.tokens'"));
}

TEST_CASE("a damaged vocabulary is refused, naming the token or merge") {
  const auto tokens = [](Texts list) {
    return with(model("gpt-2"), "tokenizer.ggml.tokens", GgufArray(std::move(list)));
  };
  const auto merges = [](Texts list) {
    return refusal(with(model("gpt-2"), "tokenizer.ggml.merges", GgufArray(std::move(list))));
  };
  CHECK(contains(refusal(tokens({"a", "b", "a"})), "tokens 0 and 2 are both 'a'"));
  CHECK(contains(refusal(tokens({"a", "\xff"})), "token 1 ('\\xff') is not valid UTF-8"));
  CHECK(contains(refusal(tokens({"a", "t", "at", "h", "hat"})), "9 token types for 5 tokens"));
  CHECK(contains(merges({"a t", "hat"}), "merge 1 is 'hat', two tokens"));
  CHECK(contains(merges({""}), "merge 0 is ''"));
  CHECK(contains(merges({"t h"}), "merge 0 is 't h', but 'th' is not among the tokens"));
  CHECK(contains(refusal(with(model("gpt-2"), "tokenizer.ggml.bos_token_id", uint32_t{9})),
                 "tokenizer.ggml.bos_token_id is 9, there are 9 tokens"));
  CHECK(contains(refusal(with(without(model("gpt-2"), "tokenizer.ggml.bos_token_id"),
                              "tokenizer.ggml.add_bos_token", true)),
                 "BOS is to be added"));
  CHECK(contains(refusal(with(model("gpt-2"), "tokenizer.chat_template", std::string("\xc0"))),
                 "'tokenizer.chat_template' is not valid UTF-8"));
}

TEST_CASE("the files are written into a folder") {
  TemporaryFolder folder;
  GgufWriter writer(folder / "x.gguf", model("smollm"), {});
  writer.commit();
  std::filesystem::create_directory(folder / "out");
  const auto file = GgufFile::open(folder / "x.gguf");
  write_tokenizer(file, folder / "out");
  CHECK(entries(folder / "out") == 4);
  for (const auto& [name, content] : tokenizer_files(file))
    CHECK(slurp(folder / "out" / name) == content);
}
