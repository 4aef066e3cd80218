#include <budwood/peft/io/text.h>
#include <budwood/peft/json.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

namespace budwood {
namespace {

constexpr size_t kMaxKeys = 20'000;
constexpr size_t kMaxShown = 100;

void check_sizes(const nlohmann::json& value, const std::string& source) {
  if (!value.is_structured()) return;
  if (value.is_object() && value.size() > kMaxKeys)
    throw Error("parse_json", fmt::format("{}: an object with {} keys; at most {} are taken",
                                          source, value.size(), kMaxKeys));
  for (const auto& item : value) check_sizes(item, source);
}

// Python's repr of a float: the shortest digits that read back, and always a point or an exponent.
std::string float_text(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value < 0 ? "-Infinity" : "Infinity";
  auto text = fmt::format("{}", value);
  if (text.find_first_of(".e") == std::string::npos) text += ".0";
  return text;
}

std::string string_text(const std::string& value) {
  return Json(value).dump(-1, ' ', true);
}

void dump(const Json& value, size_t indent, std::string& out) {
  const auto line = [&](size_t depth) { out.append("\n").append(depth, ' '); };
  if (value.is_array() && !value.empty()) {
    out += '[';
    for (size_t i = 0; i < value.size(); ++i) {
      if (i > 0) out += ',';
      line(indent + 2);
      dump(value[i], indent + 2, out);
    }
    line(indent);
    out += ']';
  } else if (value.is_object() && !value.empty()) {
    std::map<std::string, const Json*> sorted;
    for (const auto& [key, item] : value.items()) sorted.emplace(key, &item);
    out += '{';
    bool first = true;
    for (const auto& [key, item] : sorted) {
      if (!first) out += ',';
      first = false;
      line(indent + 2);
      out.append(string_text(key)).append(": ");
      dump(*item, indent + 2, out);
    }
    line(indent);
    out += '}';
  } else {
    out += value.is_number_float() ? float_text(value.get<double>()) : value.dump(-1, ' ', true);
  }
}

// Levenshtein's distance, but one name inside the other counts as near.
size_t distance(std::string_view a, std::string_view b) {
  const auto [small, large] = std::minmax(a, b, [](auto x, auto y) { return x.size() < y.size(); });
  if (small.size() >= 3 && large.find(small) != large.npos) return 1;
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0]++;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t changed = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, changed});
    }
  }
  return row[b.size()];
}

}  // namespace

Json parse_ordered_json(std::string_view text, const std::string& source) {
  check_sizes(io::parse_json(text, source), source);
  return Json::parse(text.begin(), text.end());
}

std::string dump_like_python(const Json& value) {
  std::string out;
  try {
    dump(value, 0, out);
  } catch (const nlohmann::json::exception&) {
    throw Error("to_json", "a text value is not valid UTF-8");
  }
  return out;
}

std::string shown(const Json& value) {
  std::string text = value.is_number_float()
                         ? float_text(value.get<double>())
                         : value.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > kMaxShown) {
    size_t end = kMaxShown;
    while (end > 0 && (text[end] & 0xc0) == 0x80) --end;  // never inside a character
    text = text.substr(0, end) + "...";
  }
  return text;
}

std::string nearest_name(std::string_view name, const std::vector<std::string>& candidates) {
  std::string best;
  size_t least = SIZE_MAX;
  for (const auto& candidate : candidates) {
    const size_t d = distance(name.substr(0, 200), candidate);
    if (d < least) least = d, best = candidate;
  }
  return best;
}

namespace {

template <class T>
bool read_list(const Json& value, std::vector<T>& out) {
  if (!value.is_array()) return false;
  std::vector<T> list;
  for (const auto& item : value)
    if (read_value(item, list.emplace_back())) return false;
  out = std::move(list);
  return true;
}

template <class T>
bool read_map(const Json& value, PatternMap<T>& out) {
  if (!value.is_object()) return false;
  PatternMap<T> map;
  for (const auto& [key, item] : value.items()) {
    map.emplace_back(key, T{});
    if constexpr (requires { read_value(item, map.back().second); }) {
      if (read_value(item, map.back().second)) return false;
    } else {
      if (!read_list(item, map.back().second)) return false;
    }
  }
  out = std::move(map);
  return true;
}

template <class T>
void without_repetitions(std::vector<T>& list) {
  std::set<T> seen;
  std::erase_if(list, [&](const T& item) { return !seen.insert(item).second; });
}

template <class T>
Json write_map(const PatternMap<T>& map) {
  Json object = Json::object();
  for (const auto& [key, item] : map) object[key] = item;
  return object;
}

template <class T>
Json write_optional(const std::optional<T>& value) {
  return value ? Json(*value) : Json();
}

}  // namespace

const char* read_value(const Json& value, bool& out) {
  if (!value.is_boolean()) return "true or false";
  out = value.get<bool>();
  return nullptr;
}

const char* read_value(const Json& value, int64_t& out) {
  const bool fits = value.is_number_integer() &&
                    (!value.is_number_unsigned() || value.get<uint64_t>() <= INT64_MAX);
  if (!fits) return "an integer";
  out = value.get<int64_t>();
  return nullptr;
}

const char* read_value(const Json& value, double& out) {
  if (!value.is_number()) return "a number";
  out = value.get<double>();
  return nullptr;
}

const char* read_value(const Json& value, std::string& out) {
  if (!value.is_string()) return "a text";
  out = value.get<std::string>();
  return nullptr;
}

const char* read_value(const Json& value, std::optional<int64_t>& out) {
  if (value.is_null()) return out.reset(), nullptr;
  int64_t number = 0;
  if (read_value(value, number)) return "an integer or null";
  out = number;
  return nullptr;
}

const char* read_value(const Json& value, std::optional<std::string>& out) {
  if (value.is_string()) return out = value.get<std::string>(), nullptr;
  if (!value.is_null()) return "a text or null";
  out.reset();
  return nullptr;
}

const char* read_value(const Json& value, std::optional<std::vector<std::string>>& out) {
  if (value.is_null()) return out.reset(), nullptr;
  std::vector<std::string> list;
  if (!read_list(value, list)) return "a list of names or null";
  without_repetitions(list);
  out = std::move(list);
  return nullptr;
}

const char* read_value(const Json& value, std::optional<std::vector<int64_t>>& out) {
  if (value.is_null()) return out.reset(), nullptr;
  std::vector<int64_t> list;
  if (!read_list(value, list)) return "a list of integers or null";
  out = std::move(list);
  return nullptr;
}

const char* read_value(const Json& value, std::variant<bool, std::string>& out) {
  if (value.is_boolean()) return out = value.get<bool>(), nullptr;
  if (!value.is_string()) return "true, false or a name";
  out = value.get<std::string>();
  return nullptr;
}

const char* read_value(const Json& value, Names& out) {
  if (value.is_null()) return out = std::monostate{}, nullptr;
  if (value.is_string()) return out = value.get<std::string>(), nullptr;
  std::vector<std::string> list;
  if (!read_list(value, list)) return "a list of names, a text or null";
  without_repetitions(list);
  out = std::move(list);
  return nullptr;
}

const char* read_value(const Json& value, Layers& out) {
  if (value.is_null()) return out = std::monostate{}, nullptr;
  int64_t one = 0;
  if (!read_value(value, one)) return out = one, nullptr;
  std::vector<int64_t> list;
  if (!read_list(value, list)) return "an integer, a list of integers or null";
  out = std::move(list);
  return nullptr;
}

const char* read_value(const Json& value, PatternMap<int64_t>& out) {
  if (value.is_null()) return out.clear(), nullptr;
  return read_map(value, out) ? nullptr : "an object of pattern: integer";
}

const char* read_value(const Json& value, PatternMap<double>& out) {
  if (value.is_null()) return out.clear(), nullptr;
  return read_map(value, out) ? nullptr : "an object of pattern: number";
}

const char* read_value(const Json& value, TokenIndices& out) {
  if (value.is_null()) return out = std::monostate{}, nullptr;
  std::vector<int64_t> list;
  if (read_list(value, list)) return out = std::move(list), nullptr;
  PatternMap<std::vector<int64_t>> map;
  if (!read_map(value, map)) return "a list of token ids, an object of name: list, or null";
  out = std::move(map);
  return nullptr;
}

const char* read_value(const Json& value, LayerRanges& out) {
  if (value.is_null()) return out.reset(), nullptr;
  constexpr auto wanted = "a list of [begin, end] or null";
  if (!value.is_array()) return wanted;
  std::vector<std::array<int64_t, 2>> ranges;
  for (const auto& item : value) {
    std::vector<int64_t> ends;
    if (!read_list(item, ends) || ends.size() != 2) return wanted;
    ranges.push_back({ends[0], ends[1]});
  }
  out = std::move(ranges);
  return nullptr;
}

const char* read_value(const Json& value, RawJson& out) {
  if (!value.is_null() && !value.is_object()) return "an object or null";
  out.text = value.dump();
  return nullptr;
}

Json write_value(bool value) {
  return value;
}
Json write_value(int64_t value) {
  return value;
}
Json write_value(double value) {
  return value;
}
Json write_value(const std::string& value) {
  return value;
}
Json write_value(const std::optional<int64_t>& value) {
  return value ? Json(*value) : Json();
}

Json write_value(const std::optional<std::string>& value) {
  return write_optional(value);
}
Json write_value(const std::optional<std::vector<std::string>>& value) {
  return write_optional(value);
}
Json write_value(const std::optional<std::vector<int64_t>>& value) {
  return write_optional(value);
}
Json write_value(const LayerRanges& value) {
  return write_optional(value);
}
Json write_value(const PatternMap<int64_t>& value) {
  return write_map(value);
}
Json write_value(const RawJson& value) {
  return Json::parse(value.text);
}

Json write_value(const std::variant<bool, std::string>& value) {
  if (const auto* flag = std::get_if<bool>(&value)) return *flag;
  return std::get<std::string>(value);
}

Json write_value(const Names& value) {
  if (const auto* text = std::get_if<std::string>(&value)) return *text;
  const auto* list = std::get_if<std::vector<std::string>>(&value);
  return list ? Json(std::set<std::string>(list->begin(), list->end())) : Json();
}

Json write_value(const Layers& value) {
  if (const auto* one = std::get_if<int64_t>(&value)) return *one;
  const auto* list = std::get_if<std::vector<int64_t>>(&value);
  return list ? Json(*list) : Json();
}

Json write_value(const PatternMap<double>& value) {
  Json object = Json::object();
  for (const auto& [key, number] : value) object[key] = write_number(number);
  return object;
}

Json write_value(const TokenIndices& value) {
  if (const auto* list = std::get_if<std::vector<int64_t>>(&value)) return *list;
  const auto* map = std::get_if<PatternMap<std::vector<int64_t>>>(&value);
  return map ? write_map(*map) : Json();
}

Json write_number(double value) {
  constexpr double kExact = 9007199254740992.0;  // 2^53
  if (std::trunc(value) == value && std::abs(value) <= kExact) return static_cast<int64_t>(value);
  return value;
}

ConfigField own_text(std::string name, std::string& member, const std::string& usual) {
  auto field = bind_field(std::move(name), member);
  field.is_usual = [&member, usual] { return member == usual; };
  return field;
}

}  // namespace budwood
