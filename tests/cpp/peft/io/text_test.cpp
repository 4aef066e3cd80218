#include <budwood/peft/io/text.h>
#include <budwood/quant/error.h>
#include <doctest/doctest.h>

#include <nlohmann/json.hpp>

#include "temporary_folder.h"

using namespace budwood;
using namespace budwood::io;
using namespace budwood::io::testing;

TEST_CASE("UTF-8 is accepted exactly where it is well-formed") {
  for (const char* good : {"", "abc", "\xc2\x80", "\xdf\xbf", "\xe0\xa0\x80", "\xed\x9f\xbf",
                           "\xee\x80\x80", "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf", "a\xc3\xa9z"})
    CHECK(is_utf8(good));
  for (const char* bad : {"\x80", "\xc0\x80", "\xc1\xbf", "\xe0\x9f\xbf", "\xed\xa0\x80",
                          "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xc3",
                          "\xe2\x82", "\xff", "a\xc3(", "\xe2\x28\xa1"})
    CHECK(!is_utf8(bad));
}

TEST_CASE("quoted names stay printable and short") {
  CHECK(in_quotes("a.b") == "'a.b'");
  CHECK(in_quotes(std::string("a\n\xff\x00", 4)) == "'a\\x0a\\xff\\x00'");
  CHECK(in_quotes("\xc3\xa9") == "'\xc3\xa9'");
  CHECK(in_quotes(std::string(1000, 'x')).size() < 130);
}

TEST_CASE("JSON with repeated keys, NULs, byte order marks or bad text is refused") {
  const auto message = [](std::string_view text) {
    return message_of<Error>([&] { parse_json(text, "file.json"); });
  };
  CHECK(parse_json(R"({"a":[{"b":1},{"b":2}],"b":{}})", "x")["a"][1]["b"] == 2);
  CHECK(contains(message(R"({"a":{"k":1,"k":1}})"), "'k' stands twice"));
  CHECK(contains(message(R"({"a":1,"b":[],"a":2})"), "file.json: the key 'a' stands twice"));
  CHECK(contains(message(std::string_view("{}\0", 3)), "NUL"));
  CHECK(contains(message("\xef\xbb\xbf{}"), "byte order mark"));
  CHECK(contains(message("{\"a\":\"\xff\"}"), "file.json is not valid JSON"));
  CHECK(contains(message("{} x"), "not valid JSON"));
  CHECK(contains(message(""), "not valid JSON"));
  CHECK(contains(message(std::string(100000, '[')), "levels"));
}
