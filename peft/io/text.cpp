#include <budwood/peft/io/text.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <unordered_set>
#include <vector>

namespace budwood::io {
namespace {

constexpr int kMaxDepth = 64;
constexpr size_t kMaxQuoted = 120;

// Length of the well-formed UTF-8 sequence at the start of `bytes`; 0 when there is none.
size_t sequence_length(std::string_view bytes) {
  const auto at = [&](size_t i) { return static_cast<unsigned char>(bytes[i]); };
  const unsigned char lead = at(0);
  if (lead < 0x80) return 1;
  const size_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
  if (lead < 0xc2 || lead > 0xf4 || bytes.size() < length) return 0;
  for (size_t i = 1; i < length; ++i)
    if ((at(i) & 0xc0) != 0x80) return 0;
  const bool overlong = (lead == 0xe0 && at(1) < 0xa0) || (lead == 0xf0 && at(1) < 0x90);
  const bool surrogate = lead == 0xed && at(1) > 0x9f;
  const bool beyond = lead == 0xf4 && at(1) > 0x8f;
  return overlong || surrogate || beyond ? 0 : length;
}

}  // namespace

bool is_utf8(std::string_view bytes) {
  while (!bytes.empty()) {
    const size_t n = sequence_length(bytes);
    if (n == 0) return false;
    bytes.remove_prefix(n);
  }
  return true;
}

std::string in_quotes(std::string_view name) {
  std::string text = "'";
  while (!name.empty() && text.size() < kMaxQuoted) {
    const size_t n = sequence_length(name);
    const auto byte = static_cast<unsigned char>(name[0]);
    if (n == 0 || byte < 0x20 || byte == 0x7f) {
      text += fmt::format("\\x{:02x}", byte);
      name.remove_prefix(1);
    } else {
      text += name.substr(0, n);
      name.remove_prefix(n);
    }
  }
  return text + (name.empty() ? "'" : "...'");
}

nlohmann::json parse_json(std::string_view text, const std::string& source) {
  using nlohmann::json;
  const auto refuse = [&](const std::string& fact) {
    throw Error("parse_json", fmt::format("{}: {}", source, fact));
  };
  // The parser takes a NUL for the end of the text and skips a byte order mark.
  if (text.find('\0') != std::string_view::npos) refuse("a NUL byte inside JSON");
  if (text.starts_with("\xef\xbb\xbf")) refuse("a byte order mark before JSON");
  std::vector<std::unordered_set<std::string>> keys;
  const auto watch = [&](int depth, json::parse_event_t event, json& parsed) {
    switch (event) {
      case json::parse_event_t::object_start:
      case json::parse_event_t::array_start:
        if (depth >= kMaxDepth) refuse(fmt::format("more than {} levels of JSON", kMaxDepth));
        keys.emplace_back();
        break;
      case json::parse_event_t::object_end:
      case json::parse_event_t::array_end:
        keys.pop_back();
        break;
      case json::parse_event_t::key: {
        const auto& key = parsed.get_ref<const std::string&>();
        if (!keys.back().insert(key).second)
          refuse(fmt::format("the key {} stands twice in one object", in_quotes(key)));
        break;
      }
      case json::parse_event_t::value:
        break;
    }
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), watch);
  } catch (const json::exception& e) {
    throw Error("parse_json", fmt::format("{} is not valid JSON: {}", source, e.what()));
  }
}

}  // namespace budwood::io
