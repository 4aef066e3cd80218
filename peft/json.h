#pragma once

#include <budwood/peft/config.h>

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

/// JSON of configurations: options bound to members, and text as Python writes it.
namespace budwood {

/// Objects keep the order of their keys, since the first pattern that matches counts.
using Json = nlohmann::ordered_json;

/// Parses text with the refusals of io::parse_json, and objects of more than 20,000 keys.
Json parse_ordered_json(std::string_view text, const std::string& source);
/// The text of Python's json.dumps(value, indent=2, sort_keys=True).
std::string dump_like_python(const Json& value);
/// A value for an error message: its JSON, cut when long.
std::string shown(const Json& value);
/// The candidate that is most like `name`; "" when there are none.
std::string nearest_name(std::string_view name, const std::vector<std::string>& candidates);

// Conversions of one option. read_value returns null, or what kind of value is wanted; then the
// member keeps its value. A type that an option needs and that is missing here gets its pair.
const char* read_value(const Json& value, bool& out);
const char* read_value(const Json& value, int64_t& out);
const char* read_value(const Json& value, double& out);
const char* read_value(const Json& value, std::string& out);
const char* read_value(const Json& value, std::optional<int64_t>& out);
const char* read_value(const Json& value, std::optional<std::string>& out);
const char* read_value(const Json& value, std::optional<std::vector<std::string>>& out);
const char* read_value(const Json& value, std::optional<std::vector<int64_t>>& out);
const char* read_value(const Json& value, std::variant<bool, std::string>& out);
const char* read_value(const Json& value, Names& out);
const char* read_value(const Json& value, Layers& out);
const char* read_value(const Json& value, PatternMap<int64_t>& out);
const char* read_value(const Json& value, PatternMap<double>& out);
const char* read_value(const Json& value, TokenIndices& out);
const char* read_value(const Json& value, LayerRanges& out);
const char* read_value(const Json& value, RawJson& out);

Json write_value(bool value);
Json write_value(int64_t value);
/// Always a JSON float.
Json write_value(double value);
Json write_value(const std::string& value);
Json write_value(const std::optional<int64_t>& value);
Json write_value(const std::optional<std::string>& value);
Json write_value(const std::optional<std::vector<std::string>>& value);
Json write_value(const std::optional<std::vector<int64_t>>& value);
Json write_value(const std::variant<bool, std::string>& value);
/// A list is a set: sorted, without repetitions.
Json write_value(const Names& value);
Json write_value(const Layers& value);
Json write_value(const PatternMap<int64_t>& value);
/// Integral values as JSON integers, as they are for HF PEFT.
Json write_value(const PatternMap<double>& value);
Json write_value(const TokenIndices& value);
Json write_value(const LayerRanges& value);
Json write_value(const RawJson& value);
/// A number that is an integer when it can be: lora_alpha.
Json write_number(double value);

/// One option of a configuration, bound to a member of one object.
struct ConfigField {
  std::string name;
  std::function<const char*(const Json&)> read;
  std::function<Json()> write;
  /// Where given: an option that is left out of a file while this holds.
  std::function<bool()> is_usual = {};
};

template <class T>
ConfigField bind_field(std::string name, T& member) {
  return {std::move(name),
          [&member](const Json& value) { return read_value(value, member); },
          [&member] { return write_value(member); },
          {}};
}

/// Sets one option; an Error names the option, the value and what is wanted.
void set_field(AdapterConfig& config, std::string_view name, const Json& value);
/// Sets the options that an object lists. Unknown keys: an Error that names the nearest option
/// (strict), or a warning in the config (lenient).
void set_fields(AdapterConfig& config, const Json& object, Strictness strictness);
/// All options and private keys, patterns in their own order.
Json all_fields(const AdapterConfig& config);

/// An option that HF PEFT does not have: written only where it says something, since HF PEFT
/// complains of it.
ConfigField own_text(std::string name, std::string& member, const std::string& usual);

}  // namespace budwood
