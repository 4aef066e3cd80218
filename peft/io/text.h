#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

/// Text from files that nobody vouches for.
namespace budwood::io {

/// Whether bytes are well-formed UTF-8: no overlong forms, no surrogates, nothing past U+10FFFF.
bool is_utf8(std::string_view bytes);

/// A name in single quotes for an error message: control and invalid bytes escaped, long names cut.
std::string in_quotes(std::string_view name);

/// Parses JSON and refuses what lenient parsers let through: a key given twice in one object, NUL
/// bytes, a byte order mark, invalid UTF-8, more than 64 levels. `source` stands for the text in
/// errors, usually a path.
nlohmann::json parse_json(std::string_view text, const std::string& source);

}  // namespace budwood::io
