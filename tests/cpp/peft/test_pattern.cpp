#include <budwood/peft/pattern.h>
#include <budwood/quant/error.h>
#include <doctest/doctest.h>

#include <chrono>
#include <string>

using budwood::Error;
using budwood::Pattern;

namespace {

std::string message_of(const std::string& pattern, const std::string& subject = "") {
  try {
    Pattern(pattern).full_match(subject);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

bool says(const std::string& message, const std::string& part) {
  return message.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("the three ways to match differ in where they are anchored") {
  const Pattern p("b+");
  CHECK(p.full_match("bb"));
  CHECK_FALSE(p.full_match("bba"));
  CHECK(p.match_at_start("bba"));
  CHECK_FALSE(p.match_at_start("abb"));
  CHECK(p.search("abb"));
  CHECK_FALSE(p.search("aaa"));
}

TEST_CASE("full_match backtracks into a longer alternative as Python does") {
  CHECK(Pattern("a|ab").full_match("ab"));
  CHECK(Pattern(".*?").full_match("abc"));
}

TEST_CASE("a named group is read from a match at the start") {
  const Pattern p(R"((?:^|.*?\.)layers\.(?P<idx>\d+)\.)");
  CHECK(p.group_at_start("model.layers.12.q.layers.3.x", "idx") == "12");
  CHECK_FALSE(p.group_at_start("model.h.12.q", "idx").has_value());
  CHECK_FALSE(p.group_at_start("model.layers.12.q", "other").has_value());
  CHECK_FALSE(Pattern("a|(?P<idx>b)").group_at_start("a", "idx").has_value());
}

TEST_CASE("Python's dialect is read as Python reads it") {
  CHECK(Pattern("a{,2}").full_match("aa"));
  CHECK(Pattern("a{,2}").full_match(""));
  CHECK_FALSE(Pattern("a{,2}").full_match("aaa"));
  CHECK(Pattern("a{,}").full_match("aaaa"));
  CHECK(Pattern("a{1,2}b{2}c{1,}").full_match("abbccc"));
  CHECK(Pattern("a{").full_match("a{"));
  CHECK(Pattern("a{}").full_match("a{}"));
  CHECK(Pattern("a{x}").full_match("a{x}"));
  CHECK(Pattern("a{1").full_match("a{1"));
  CHECK_FALSE(Pattern("a\\Z").match_at_start("a\n"));
  CHECK(Pattern("a$").match_at_start("a\n"));
  CHECK(Pattern("\\v").full_match("\v"));
  CHECK_FALSE(Pattern("\\v").full_match("\n"));
  CHECK(Pattern("[]a]+").full_match("]a"));
  CHECK(Pattern("[^]a]+").full_match("bc"));
  CHECK(Pattern("[[:alpha:]").full_match("["));
  CHECK_FALSE(Pattern("[[:alpha:]").full_match("z"));
  CHECK(Pattern("\\x41\\u0042\\U00000043").full_match("ABC"));
  CHECK(Pattern("\\101\\0").full_match(std::string("A\0", 2)));
  CHECK(Pattern("(a)\\1").full_match("aa"));
  CHECK(Pattern("(?P<n>a)(?P=n)").full_match("aa"));
  CHECK(Pattern("(?P<n>a)?(?(n)b|c)").full_match("ab"));
  CHECK(Pattern("(a)?(?(1)b|c)").full_match("c"));
  CHECK(Pattern("(?i)A(?#comment)b").full_match("aB"));
  CHECK(Pattern("(?i:A)b").full_match("ab"));
  CHECK(Pattern("(?>a+)b").full_match("aab"));
  CHECK(Pattern("\\w+").full_match("é"));
  CHECK(Pattern(".").full_match("é"));
  CHECK_FALSE(Pattern(".").full_match("\n"));
  CHECK(Pattern(".").full_match("\r"));
}

TEST_CASE("what Python refuses is refused") {
  for (const char* p : {"\\h",     "\\R",     "\\K",       "\\z",
                        "\\Qa\\E", "\\p{L}",  "(*ACCEPT)", "(*LIMIT_MATCH=9)a",
                        "(?R)",    "(?1)",    "(a)(?&x)",  "(?|a)",
                        "(?<n>a)", "(?'n'a)", "(?C1)a",    "a(?i)",
                        "[\\A]",   "\\1",     "(",         ")",
                        "[a",      "*a",      "a\\",       "\\x4",
                        "(?P>n)",  "(?"}) {
    CAPTURE(std::string(p));
    CHECK_THROWS_AS(Pattern{p}, Error);
  }
}

TEST_CASE("a syntax error names the pattern and the position") {
  CHECK(says(message_of("ab(cd"), "'ab(cd'"));
  CHECK(says(message_of("ab(cd"), "position 5"));
  CHECK(says(message_of("ab\\h"), "position 2: bad escape \\h"));
  // Rewriting must not shift the position.
  CHECK(says(message_of("\\v{,3}a{,2}\\u0041\\q"), "position 17"));
}

TEST_CASE("a fault inside a frame is told in positions of the part that was given") {
  try {
    Pattern("(.*\\.)?(", "q((", ")$");
    FAIL("accepted");
  } catch (const Error& e) {
    CHECK(says(e.what(), "'q(('"));
    CHECK_FALSE(says(e.what(), "(.*"));
  }
  CHECK(Pattern("(.*\\.)?(", "q_proj", ")$").match_at_start("a.q_proj"));
}

TEST_CASE("a pattern that backtracks without end is refused quickly") {
  const auto begin = std::chrono::steady_clock::now();
  const std::string subject = std::string(60, 'a') + "!";
  for (const char* p :
       {"(a+)+$", "(a|a)*$", "(a|aa)+$", "(.*)*[xy]", "(?:a?){60}a{60}$", "(.*a){40}"}) {
    CAPTURE(std::string(p));
    CHECK(says(message_of(p, subject), "too expensive"));
  }
  CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(3));
}

TEST_CASE("long subjects of ordinary patterns are no problem") {
  std::string path;
  for (int i = 0; i < 2000; ++i) path += "module.";
  CHECK(Pattern(R"(.*\.(q_proj|v_proj))").full_match(path + "v_proj"));
  CHECK_FALSE(Pattern(R"((.*\.)?(q_proj)$)").match_at_start(path + "v_proj"));
}

TEST_CASE("sizes are bounded") {
  CHECK(says(message_of(std::string(Pattern::kMaxLength + 1, 'a')), "10001 bytes"));
  CHECK_NOTHROW(Pattern(std::string(Pattern::kMaxLength, 'a')));
  CHECK_THROWS_AS(Pattern{std::string(4000, '(') + std::string(4000, ')')}, Error);
  CHECK_THROWS_AS(Pattern{"((a{1000}){1000}){1000}"}, Error);
  CHECK_THROWS_AS(Pattern{"\xff"}, Error);
  CHECK_THROWS_AS(Pattern{"a"}.search("\xff"), Error);
}
