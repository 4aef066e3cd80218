#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace budwood {

/// A regular expression with the syntax and the meaning of Python's `re` on text.
///
/// Patterns come from files that nobody vouches for, so both sides are bounded: a pattern has at
/// most kMaxLength bytes, and a match that backtracks too much ends with an Error that calls the
/// pattern too expensive. What Python's `re` refuses (`\h`, recursion, verbs such as `(*ACCEPT)`)
/// is refused here too; the flags a, L and x and `\N{name}` are not supported.
class Pattern {
 public:
  static constexpr size_t kMaxLength = 10'000;

  /// Compiles a pattern; an Error names it and the position (in bytes) of the fault.
  explicit Pattern(std::string_view text) : Pattern("", text, "") {}
  /// Compiles prefix + text + suffix as one pattern; errors speak of `text` alone.
  Pattern(std::string_view prefix, std::string_view text, std::string_view suffix);
  ~Pattern();
  Pattern(Pattern&&) noexcept;
  Pattern& operator=(Pattern&&) noexcept;

  /// re.fullmatch
  bool full_match(std::string_view subject) const;
  /// re.match
  bool match_at_start(std::string_view subject) const;
  /// re.search
  bool search(std::string_view subject) const;
  /// The named group of re.match; nothing when there is no match or the group took no part in it.
  std::optional<std::string> group_at_start(std::string_view subject, const char* group) const;

  /// The pattern as it was written, without prefix and suffix.
  const std::string& text() const { return text_; }

 private:
  struct Compiled;
  struct Match;
  bool run(std::string_view subject, uint32_t options, Match& match) const;

  std::string text_;
  std::unique_ptr<Compiled> compiled_;
};

}  // namespace budwood
