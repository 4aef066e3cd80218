#include <budwood/peft/io/gguf_tokenizer.h>
#include <budwood/peft/io/text.h>
#include <budwood/peft/io/tokenizer_tables.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <charconv>
#include <nlohmann/json.hpp>
#include <set>
#include <unordered_map>

namespace budwood::io {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

[[noreturn]] void refuse(const fs::path& from, const std::string& fact) {
  throw Error("tokenizer_metadata", fmt::format("{}: {}", from.string(), fact));
}

const std::string kWithout = "; leave tokenizer_from empty to write the model without a tokeniser";

std::string placeholder(size_t id) {
  return fmt::format("[PAD{}]", id);
}

void check_count(const fs::path& from, size_t tokens, int64_t vocabulary) {
  if (tokens > static_cast<size_t>(vocabulary))
    refuse(from,
           fmt::format("{} tokens, but the model's token table has {} rows", tokens, vocabulary));
}

Json read_json(const fs::path& path) {
  if (!fs::exists(path)) return Json::object();
  auto json = parse_json(read_file(path), path.string());
  if (!json.is_object()) refuse(path, "the file is not a JSON object");
  return json;
}

bool truthy(const Json& json, const char* key) {
  const auto it = json.find(key);
  return it != json.end() && !it->is_null() && *it != false && *it != "";
}

/// A byte-level BPE tokeniser of a folder.
class Folder {
 public:
  explicit Folder(const fs::path& folder, int64_t vocabulary)
      : from_(folder), vocabulary_(vocabulary) {
    if (!fs::exists(from_ / "tokenizer.json")) refuse_kind();
    tokenizer_ = read_json(from_ / "tokenizer.json");
    config_ = read_json(from_ / "tokenizer_config.json");
    try {
      read_model();
      read_splitting();
      read_tokens();
      read_added();
      fill();
    } catch (const Json::exception& e) {
      refuse(from_ / "tokenizer.json", e.what());
    }
  }

  TokenizerMetadata metadata() {
    add("tokenizer.ggml.model", std::string("gpt2"));
    add("tokenizer.ggml.pre", pre_.name);
    add("tokenizer.ggml.tokens", GgufArray(tokens_));
    add("tokenizer.ggml.token_type", GgufArray(types_));
    add("tokenizer.ggml.merges", GgufArray(merges()));
    if (pre_.prefix_space) add("tokenizer.ggml.add_space_prefix", true);
    const auto named = special_tokens();
    for (const auto& [name, key] : kSpecialTokens)
      if (const auto it = named.find(name); it != named.end())
        add(std::string("tokenizer.ggml.") + key, it->second);
    add_bos_and_eos(named);
    add_templates();
    return std::move(out_);
  }

 private:
  // No tokenizer.json: name the kind by the files there are.
  [[noreturn]] void refuse_kind() const {
    std::string found = "no tokeniser";
    if (fs::exists(from_ / "tokenizer.model"))
      found = "a SentencePiece tokeniser (tokenizer.model)";
    if (fs::exists(from_ / "vocab.txt")) found = "a WordPiece tokeniser (vocab.txt)";
    if (fs::exists(from_ / "merges.txt")) found = "vocab.json and merges.txt alone";
    refuse(from_,
           fmt::format("found {}; wanted byte-level BPE as tokenizer.json{}", found, kWithout));
  }

  [[noreturn]] void refuse_found(const std::string& found) const {
    refuse(from_ / "tokenizer.json",
           fmt::format("found {}; supported is byte-level BPE{}", found, kWithout));
  }

  void read_model() {
    if (!tokenizer_.contains("model")) refuse_found("no model");
    const auto& model = tokenizer_["model"];
    const auto type = model.value("type", "");
    // Files from before "type" are BPE when they have merges.
    if (type != "BPE" && !(type.empty() && model.contains("merges")))
      refuse_found(fmt::format("a tokeniser of kind {}",
                               in_quotes(type.empty() ? std::string("unknown") : type)));
    if (truthy(model, "byte_fallback"))
      refuse_found("BPE over characters with a fallback to bytes (SentencePiece)");
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix", "dropout"})
      if (truthy(model, key)) refuse_found(fmt::format("BPE with '{}'", key));
  }

  void read_splitting() {
    const auto pre = tokenizer_.value("pre_tokenizer", Json());
    const auto found = find_pre_tokenizer(pre);
    if (!found) {
      auto text = pre.dump();
      if (text.size() > 300) text = text.substr(0, 300) + "...";
      refuse(from_ / "tokenizer.json",
             fmt::format("tokenizer.ggml.pre has no name that is known here for the pre-tokeniser "
                         "{}; known are {}{}",
                         text, fmt::join(gguf_pre_tokenizers(), ", "), kWithout));
    }
    pre_ = *found;
    const auto normalizer = tokenizer_.value("normalizer", Json());
    const Json wanted = normalizer_json(pre_.pre);
    if (normalizer != wanted)
      refuse(from_ / "tokenizer.json",
             fmt::format("the pre-tokeniser is that of '{}', whose normaliser is {}, found {}{}",
                         pre_.name, wanted.dump(), normalizer.dump(), kWithout));
    if (truthy(tokenizer_["model"], "ignore_merges") != ignores_merges(pre_.pre))
      refuse(
          from_ / "tokenizer.json",
          fmt::format("the pre-tokeniser is that of '{}', which has ignore_merges {}, found {}{}",
                      pre_.name, ignores_merges(pre_.pre), !ignores_merges(pre_.pre), kWithout));
  }

  void place(const std::string& token, int64_t id, int32_t type) {
    if (id < 0 || id >= vocabulary_)
      refuse(from_,
             fmt::format("the token {} has the id {}, but the model's token table has {} rows",
                         in_quotes(token), id, vocabulary_));
    const auto at = static_cast<size_t>(id);
    if (at >= tokens_.size()) {
      tokens_.resize(at + 1);
      types_.resize(at + 1, kUnused);
      filled_.resize(at + 1, false);
    }
    const auto [known, fresh] = ids_.emplace(token, id);
    if (!fresh && known->second != id)
      refuse(from_, fmt::format("the token {} has the ids {} and {}", in_quotes(token),
                                known->second, id));
    if (filled_[at] && tokens_[at] != token)
      refuse(from_, fmt::format("the tokens {} and {} have both the id {}", in_quotes(tokens_[at]),
                                in_quotes(token), id));
    tokens_[at] = token;
    types_[at] = type;
    filled_[at] = true;
  }

  void read_tokens() {
    const auto& vocab = tokenizer_["model"].at("vocab");
    if (!vocab.is_object()) refuse_found("a vocabulary that is not an object of ids");
    for (const auto& [token, id] : vocab.items()) place(token, id.get<int64_t>(), kNormal);
  }

  void read_added(const Json& token, int64_t id) {
    const auto content = token.at("content").get<std::string>();
    place(content, id, token.value("special", false) ? kControl : kUserDefined);
    for (const char* key : {"lstrip", "rstrip", "single_word"})
      if (token.value(key, false))
        out_.warnings.push_back(fmt::format("the token {} has '{}', which a GGUF file cannot say",
                                            in_quotes(content), key));
  }

  // transformers adds to tokenizer.json what the configuration lists beyond it.
  void read_added() {
    std::set<int64_t> known;
    for (const auto& token : tokenizer_.value("added_tokens", Json::array())) {
      const auto id = token.at("id").get<int64_t>();
      known.insert(id);
      read_added(token, id);
    }
    const auto more = config_.value("added_tokens_decoder", Json::object());
    for (const auto& [text, token] : more.items()) {
      int64_t id = -1;
      const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), id);
      if (error != std::errc() || end != text.data() + text.size())
        refuse(from_ / "tokenizer_config.json",
               fmt::format("'added_tokens_decoder' has ids as keys, found {}", in_quotes(text)));
      if (!known.contains(id)) read_added(token, id);
    }
  }

  // Every row of the token table has a token in a GGUF file.
  void fill() {
    const size_t rows = static_cast<size_t>(vocabulary_);
    filled_.resize(rows, false);
    tokens_.resize(rows);
    types_.resize(rows, kUnused);
    for (size_t i = 0; i < rows; ++i) {
      if (filled_[i]) continue;
      tokens_[i] = placeholder(i);
      if (ids_.contains(tokens_[i]))
        refuse(from_, fmt::format("no token has the id {}, and another is called {}", i,
                                  in_quotes(tokens_[i])));
    }
  }

  std::vector<std::string> merges() const {
    std::vector<std::string> list;
    for (const auto& merge : tokenizer_["model"].at("merges")) {
      std::string left, right;
      if (merge.is_array() && merge.size() == 2) {
        left = merge[0].get<std::string>(), right = merge[1].get<std::string>();
      } else if (merge.is_string()) {
        const auto text = merge.get<std::string>();
        const auto space = text.find(' ', 1);
        if (space != std::string::npos)
          left = text.substr(0, space), right = text.substr(space + 1);
      }
      if (left.empty() || right.empty() || left.find(' ') != std::string::npos ||
          right.find(' ') != std::string::npos)
        refuse(from_ / "tokenizer.json",
               fmt::format("merge {} is {}; wanted two tokens without spaces", list.size(),
                           in_quotes(merge.dump())));
      list.push_back(left + " " + right);
    }
    return list;
  }

  std::map<std::string, uint32_t> special_tokens() const {
    const auto map = read_json(from_ / "special_tokens_map.json");
    std::map<std::string, uint32_t> named;
    for (const auto& [name, key] : kSpecialTokens) {
      auto token = config_.value(name, Json());
      if (token.is_null()) token = map.value(name, Json());
      if (token.is_object()) token = token.value("content", Json());
      if (!token.is_string()) continue;
      const auto it = ids_.find(token.get<std::string>());
      if (it == ids_.end())
        refuse(from_, fmt::format("'{}' is {}, which is not among the tokens", name,
                                  in_quotes(token.get<std::string>())));
      named[name] = static_cast<uint32_t>(it->second);
    }
    return named;
  }

  // Which special token the post-processor puts first or last around one text.
  std::optional<int64_t> around(bool first) const {
    auto processors = Json::array({tokenizer_.value("post_processor", Json())});
    if (processors[0].is_object() && processors[0].contains("processors"))
      processors = processors[0]["processors"];
    for (const auto& p : processors) {
      if (!p.is_object() || p.value("type", "") != "TemplateProcessing") continue;
      const auto& single = p.at("single");
      if (single.empty()) continue;
      const auto& end = first ? single.front() : single.back();
      if (!end.contains("SpecialToken")) continue;
      const auto token = end["SpecialToken"].at("id").get<std::string>();
      const auto it = ids_.find(token);
      if (it == ids_.end())
        refuse(from_, fmt::format("the post-processor adds {}, which is not among the tokens",
                                  in_quotes(token)));
      return it->second;
    }
    return std::nullopt;
  }

  // As transformers 5 does: settings in the configuration go before the post-processor.
  void add_bos_and_eos(const std::map<std::string, uint32_t>& named) {
    const bool configured = config_.contains("add_bos_token") || config_.contains("add_eos_token");
    const auto decide = [&](const char* token, const char* setting, bool first) {
      const auto known = named.find(token);
      bool wanted = configured && truthy(config_, setting) && known != named.end();
      if (!configured)
        if (const auto id = around(first)) {
          if (known == named.end() || known->second != *id)
            refuse(from_, fmt::format("the post-processor adds the token {}, which is not the {}{}",
                                      *id, token, kWithout));
          wanted = true;
        }
      add(std::string("tokenizer.ggml.") + setting, wanted);
    };
    decide("bos_token", "add_bos_token", true);
    decide("eos_token", "add_eos_token", false);
  }

  // The template under "default", further ones under their names.
  std::map<std::string, std::string> templates() const {
    std::map<std::string, std::string> all;
    const auto take = [&](const Json& value) {
      if (value.is_string()) all["default"] = value.get<std::string>();
      if (value.is_array())
        for (const auto& item : value)
          all[item.at("name").get<std::string>()] = item.at("template").get<std::string>();
    };
    take(config_.value("chat_template", Json()));
    if (all.empty()) take(read_json(from_ / "chat_template.json").value("chat_template", Json()));
    if (fs::exists(from_ / "chat_template.jinja"))
      all["default"] = read_file(from_ / "chat_template.jinja");
    if (const auto more = from_ / "additional_chat_templates"; fs::is_directory(more))
      for (const auto& entry : fs::directory_iterator(more))
        if (entry.path().extension() == ".jinja")
          all[entry.path().stem().string()] = read_file(entry.path());
    return all;
  }

  void add_templates() {
    std::vector<std::string> names;
    for (const auto& [name, text] : templates()) {
      if (!is_utf8(text)) refuse(from_, fmt::format("the chat template '{}' is not UTF-8", name));
      if (name == "default") {
        add("tokenizer.chat_template", text);
        continue;
      }
      names.push_back(name);
      add("tokenizer.chat_template." + name, text);
    }
    if (!names.empty()) add("tokenizer.chat_templates", GgufArray(names));
  }

  void add(std::string key, GgufValue value) {
    out_.keys.emplace_back(std::move(key), std::move(value));
  }

  fs::path from_;
  int64_t vocabulary_;
  Json tokenizer_, config_;
  NamedPreTokenizer pre_;
  std::vector<std::string> tokens_;
  std::vector<int32_t> types_;
  std::vector<bool> filled_;
  std::unordered_map<std::string, int64_t> ids_;
  TokenizerMetadata out_;
};

TokenizerMetadata from_gguf(const fs::path& from, int64_t vocabulary) {
  const auto file = GgufFile::open(from);
  TokenizerMetadata out;
  for (const auto& entry : file.metadata())
    if (entry.first.starts_with("tokenizer.")) out.keys.push_back(entry);
  if (!file.has("tokenizer.ggml.tokens")) return out;
  const auto count = file.get_strings("tokenizer.ggml.tokens").size();
  const auto rows = static_cast<size_t>(vocabulary);
  check_count(from, count, vocabulary);
  for (auto& [key, value] : out.keys) {
    auto* array = std::get_if<GgufArray>(&value);
    if (!array) continue;
    if (key == "tokenizer.ggml.tokens") {
      auto& tokens = std::get<std::vector<std::string>>(*array);
      for (size_t i = count; i < rows; ++i) tokens.push_back(placeholder(i));
    } else if (key == "tokenizer.ggml.token_type") {
      if (auto* types = std::get_if<std::vector<int32_t>>(array)) types->resize(rows, kUnused);
    } else if (key == "tokenizer.ggml.scores") {
      if (auto* scores = std::get_if<std::vector<float>>(array)) scores->resize(rows, -1000.0f);
    }
  }
  return out;
}

}  // namespace

TokenizerMetadata tokenizer_metadata(const fs::path& from, int64_t vocabulary) {
  if (from.empty()) return {{{"tokenizer.ggml.model", std::string("no_vocab")}}, {}};
  if (!fs::exists(from)) refuse(from, "no such folder or GGUF file");
  if (!fs::is_directory(from)) return from_gguf(from, vocabulary);
  return Folder(from, vocabulary).metadata();
}

}  // namespace budwood::io
