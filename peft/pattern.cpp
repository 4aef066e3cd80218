#define PCRE2_CODE_UNIT_WIDTH 8
#include <budwood/peft/io/text.h>
#include <budwood/peft/pattern.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>
#include <pcre2.h>

#include <vector>

namespace budwood {
namespace {

constexpr uint32_t kMatchLimit = 500'000;
constexpr uint32_t kDepthLimit = 50'000;
constexpr uint32_t kHeapLimit = 64 * 1024;  // KiB

// A fault in a pattern, at a byte of the text that was being read.
struct Fault {
  size_t position;
  std::string reason;
};

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}
bool is_octal(char c) {
  return c >= '0' && c <= '7';
}
bool is_hex(char c) {
  return is_digit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
}
bool is_letter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

// Rewrites Python's dialect into PCRE2's where the two read the same text differently, and refuses
// what Python does not have.
class Translation {
 public:
  explicit Translation(std::string_view source) : source_(source) {
    while (at_ < source_.size()) step();
  }

  const std::string& text() const { return text_; }
  size_t origin(size_t offset) const {
    return offset < origin_.size() ? origin_[offset] : source_.size();
  }

 private:
  char peek(size_t ahead = 0) const {
    return at_ + ahead < source_.size() ? source_[at_ + ahead] : '\0';
  }
  void emit(std::string_view out, size_t consumed) {
    text_ += out;
    origin_.insert(origin_.end(), out.size(), at_);
    at_ += consumed;
  }
  void copy(size_t count) {
    for (; count > 0 && at_ < source_.size(); --count) emit(source_.substr(at_, 1), 1);
  }
  [[noreturn]] void refuse(std::string reason) const { throw Fault{at_, std::move(reason)}; }

  void step() {
    switch (peek()) {
      case '\\':
        return escape(/*in_class=*/false);
      case '[':
        return character_class();
      case '(':
        return group();
      case '{':
        return repeat();
      default:
        return copy(1);
    }
  }

  void hex(size_t digits) {
    for (size_t i = 0; i < digits; ++i)
      if (!is_hex(peek(2 + i)))
        refuse(
            fmt::format("incomplete escape \\{}, {} hexadecimal digits wanted", peek(1), digits));
    emit(fmt::format("\\x{{{}}}", source_.substr(at_ + 2, digits)), 2 + digits);
  }

  void number(bool in_class) {
    size_t octal = 0;
    while (octal < 3 && is_octal(peek(1 + octal))) ++octal;
    const bool is_code = peek(1) == '0' || octal == 3;
    if (is_code && (octal < 3 || peek(1) <= '3'))
      return emit(fmt::format("\\o{{{}}}", source_.substr(at_ + 1, octal)), 1 + octal);
    if (in_class) refuse(fmt::format("bad escape \\{}", peek(1)));
    const size_t digits = is_digit(peek(2)) ? 2 : 1;
    emit(fmt::format("\\g{{{}}}", source_.substr(at_ + 1, digits)), 1 + digits);
  }

  void escape(bool in_class) {
    const char c = peek(1);
    if (at_ + 1 >= source_.size()) refuse("a backslash at the end");
    if (is_digit(c)) return number(in_class);
    if (!is_letter(c)) return copy(2);
    switch (c) {
      case 'd':
      case 'D':
      case 's':
      case 'S':
      case 'w':
      case 'W':
      case 'a':
      case 'f':
      case 'n':
      case 'r':
      case 't':
        return copy(2);
      case 'v':
        return emit("\\x0b", 2);
      case 'x':
        return hex(2);
      case 'u':
        return hex(4);
      case 'U':
        return hex(8);
      case 'b':
        return copy(2);
      case 'A':
      case 'B':
        if (!in_class) return copy(2);
        break;
      case 'Z':  // the very end; PCRE2's \Z also stops before a last newline
        if (!in_class) return emit("\\z", 2);
        break;
      default:
        break;
    }
    refuse(fmt::format("bad escape \\{}", c));
  }

  void character_class() {
    copy(1);
    if (peek() == '^') copy(1);
    if (peek() == ']') emit("\\]", 1);
    while (at_ < source_.size() && peek() != ']') {
      if (peek() == '\\') {
        escape(/*in_class=*/true);
      } else if (peek() == '[') {
        emit("\\[", 1);  // no POSIX classes in Python
      } else {
        copy(1);
      }
    }
    copy(1);
  }

  void repeat() {
    size_t end = 1;
    while (is_digit(peek(end))) ++end;
    const bool open = end == 1;
    if (peek(end) == ',') {
      ++end;
      while (is_digit(peek(end))) ++end;
    } else if (open) {
      return emit("\\{", 1);
    }
    if (peek(end) != '}') return emit("\\{", 1);
    if (!open) return copy(end + 1);
    emit("{0", 1);  // Python's {,n}
    copy(end);
  }

  void group() {
    if (peek(1) == '*') refuse("nothing to repeat");
    if (peek(1) != '?') return copy(1);
    switch (peek(2)) {
      case ':':
      case '=':
      case '!':
      case '>':
        return copy(3);
      case '<':
        if (peek(3) == '=' || peek(3) == '!') return copy(4);
        break;
      case '#': {
        const size_t end = source_.find(')', at_);
        if (end == std::string_view::npos) refuse("missing ), unterminated comment");
        at_ = end + 1;
        return;
      }
      case 'P':
        if (peek(3) == '<' || peek(3) == '=') return copy(4);
        break;
      case '(': {
        const size_t end = source_.find(')', at_);
        if (end == std::string_view::npos) refuse("missing ), unterminated name");
        const auto name = source_.substr(at_ + 3, end - at_ - 3);
        const bool number = !name.empty() && name.find_first_not_of("0123456789") == name.npos;
        return emit(number ? fmt::format("(?({})", name) : fmt::format("(?(<{}>)", name),
                    end + 1 - at_);
      }
      default:
        return flags();
    }
    refuse(fmt::format("unknown extension (?{}{}", peek(2), peek(3) ? peek(3) : ' '));
  }

  void flags() {
    size_t end = 2;
    std::string kept;
    for (;; ++end) {
      const char c = peek(end);
      if (c == ')' || c == ':') break;
      if (c == 'u') continue;  // text is the only mode
      if (c == 'a' || c == 'L' || c == 'x') refuse(fmt::format("the flag {} is not supported", c));
      if (c != 'i' && c != 'm' && c != 's' && c != '-')
        refuse(fmt::format("unknown extension (?{}", peek(2)));
      kept += c;
    }
    if (peek(end) == ')' && at_ > 0) refuse("global flags not at the start of the expression");
    emit(fmt::format("(?{}{}", kept, peek(end)), end + 1);
  }

  std::string_view source_;
  size_t at_ = 0;
  std::string text_;
  std::vector<size_t> origin_;
};

std::string reason_of(int code) {
  char text[256] = "";
  pcre2_get_error_message(code, reinterpret_cast<PCRE2_UCHAR*>(text), sizeof text);
  return text;
}

}  // namespace

struct Pattern::Compiled {
  ~Compiled() {
    pcre2_match_context_free(limits);
    pcre2_code_free(code);
  }
  pcre2_code* code = nullptr;
  pcre2_match_context* limits = nullptr;
};

struct Pattern::Match {
  explicit Match(const pcre2_code* code)
      : data(pcre2_match_data_create_from_pattern(code, nullptr)) {}
  ~Match() { pcre2_match_data_free(data); }
  Match(const Match&) = delete;
  pcre2_match_data* data;
};

Pattern::Pattern(std::string_view prefix, std::string_view text, std::string_view suffix)
    : text_(text), compiled_(std::make_unique<Compiled>()) {
  const auto fail = [&](size_t position, const std::string& reason) {
    const size_t own = position < prefix.size() ? 0 : position - prefix.size();
    throw Error("Pattern", fmt::format("the regular expression {} has a fault at position {}: {}",
                                       io::in_quotes(text), std::min(own, text.size()), reason));
  };
  if (text.size() > kMaxLength)
    throw Error("Pattern",
                fmt::format("the regular expression {} has {} bytes; at most {} are taken",
                            io::in_quotes(text), text.size(), kMaxLength));
  const std::string whole = std::string(prefix).append(text).append(suffix);
  try {
    const Translation translation(whole);
    const std::string& own = translation.text();
    std::unique_ptr<pcre2_compile_context, void (*)(pcre2_compile_context*)> context(
        pcre2_compile_context_create(nullptr), pcre2_compile_context_free);
    pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
    int error = 0;
    PCRE2_SIZE offset = 0;
    compiled_->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(own.data()), own.size(),
                                    PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error,
                                    &offset, context.get());
    if (!compiled_->code) fail(translation.origin(offset), reason_of(error));
  } catch (const Fault& fault) {
    fail(fault.position, fault.reason);
  }
  compiled_->limits = pcre2_match_context_create(nullptr);
  pcre2_set_match_limit(compiled_->limits, kMatchLimit);
  pcre2_set_depth_limit(compiled_->limits, kDepthLimit);
  pcre2_set_heap_limit(compiled_->limits, kHeapLimit);
}

Pattern::~Pattern() = default;
Pattern::Pattern(Pattern&&) noexcept = default;
Pattern& Pattern::operator=(Pattern&&) noexcept = default;

bool Pattern::run(std::string_view subject, uint32_t options, Match& match) const {
  const int result = pcre2_match(compiled_->code, reinterpret_cast<PCRE2_SPTR>(subject.data()),
                                 subject.size(), 0, options, match.data, compiled_->limits);
  if (result == PCRE2_ERROR_NOMATCH) return false;
  if (result == PCRE2_ERROR_MATCHLIMIT || result == PCRE2_ERROR_DEPTHLIMIT ||
      result == PCRE2_ERROR_HEAPLIMIT)
    throw Error("Pattern", fmt::format("the regular expression {} is too expensive: it backtracks "
                                       "without end on {}; rewrite it without nested repeats",
                                       io::in_quotes(text_), io::in_quotes(subject)));
  if (result < 0)
    throw Error("Pattern",
                fmt::format("the regular expression {} cannot be matched against {}: {}",
                            io::in_quotes(text_), io::in_quotes(subject), reason_of(result)));
  return true;
}

bool Pattern::full_match(std::string_view subject) const {
  Match match(compiled_->code);
  return run(subject, PCRE2_ANCHORED | PCRE2_ENDANCHORED, match);
}

bool Pattern::match_at_start(std::string_view subject) const {
  Match match(compiled_->code);
  return run(subject, PCRE2_ANCHORED, match);
}

bool Pattern::search(std::string_view subject) const {
  Match match(compiled_->code);
  return run(subject, 0, match);
}

std::optional<std::string> Pattern::group_at_start(std::string_view subject,
                                                   const char* group) const {
  Match match(compiled_->code);
  if (!run(subject, PCRE2_ANCHORED, match)) return {};
  const int number =
      pcre2_substring_number_from_name(compiled_->code, reinterpret_cast<PCRE2_SPTR>(group));
  if (number < 0) return {};
  const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(match.data);
  const PCRE2_SIZE begin = ends[2 * number], end = ends[2 * number + 1];
  if (begin == PCRE2_UNSET) return {};
  return std::string(subject.substr(begin, end - begin));
}

}  // namespace budwood
