#include <budwood/peft/io/dtype.h>
#include <doctest/doctest.h>

#include <array>
#include <vector>

using namespace budwood::io;

TEST_CASE("every dtype name leads to its type and back") {
  const std::vector<std::pair<const char*, uint32_t>> types = {
      {"BOOL", 8},        {"U8", 8},          {"I8", 8},   {"U16", 16},    {"I16", 16},
      {"U32", 32},        {"I32", 32},        {"U64", 64}, {"I64", 64},    {"F16", 16},
      {"BF16", 16},       {"F32", 32},        {"F64", 64}, {"C64", 64},    {"F8_E4M3", 8},
      {"F8_E5M2", 8},     {"F8_E8M0", 8},     {"F4", 4},   {"F6_E2M3", 6}, {"F6_E3M2", 6},
      {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8},
  };
  for (const auto& [name, bits] : types) {
    const auto dtype = dtype_from_name(name);
    REQUIRE(dtype);
    CHECK(dtype_name(*dtype) == name);
    CHECK(dtype_bits(*dtype) == bits);
  }
  for (const char* name : {"F8_E4M3FN", "C128", "I4", "U4", "f32", "", "float32"})
    CHECK(!dtype_from_name(name));
}

TEST_CASE("element and byte counts are exact or absent") {
  const auto count = [](std::vector<int64_t> shape) { return element_count(shape); };
  CHECK(count({}) == 1);
  CHECK(count({2, 3, 4}) == 24);
  CHECK(count({5, 0, 7}) == 0);
  CHECK(count({int64_t{1} << 31, int64_t{1} << 32}) == uint64_t{1} << 63);
  CHECK(!count({int64_t{1} << 33, int64_t{1} << 33}));
  CHECK(!count({int64_t{1} << 62, 4}));
  CHECK(!count({-1}));
  CHECK(byte_count(Dtype::f4, 6) == 3);
  CHECK(!byte_count(Dtype::f4, 3));
  CHECK(byte_count(Dtype::f6_e2m3, 4) == 3);
  CHECK(!byte_count(Dtype::f6_e3m2, 2));
  CHECK(!byte_count(Dtype::f64, uint64_t{1} << 58));
}
