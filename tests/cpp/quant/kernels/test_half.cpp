#include <budwood/quant/kernels/half.h>
#include <doctest/doctest.h>

#include "test_data.h"

using namespace budwood::quant::kernels;

namespace {

/// Floats at, between and around all 16-bit values, and random bit patterns.
std::vector<float> hard_floats() {
  std::vector<float> values;
  for (uint32_t half = 0; half < 0x10000; half += 7) {
    const uint32_t fp16 = float_bits(fp16_to_fp32(static_cast<uint16_t>(half)));
    for (uint32_t bits : {fp16, fp16 + 0xfff, fp16 + 0x1000, fp16 + 0x1001, half << 16,
                          (half << 16) + 0x7fff, (half << 16) + 0x8000, (half << 16) + 0x8001}) {
      values.push_back(float_from_bits(bits));
    }
  }
  std::mt19937 generator(1);
  for (int i = 0; i < 100003; ++i) {
    values.push_back(float_from_bits(static_cast<uint32_t>(generator())));
  }
  return values;
}

/// Round to nearest even by comparing with both neighbours in double.
uint16_t nearest_fp16(float value) {
  const uint32_t sign = float_bits(value) >> 31 << 15;
  const double magnitude = std::fabs(static_cast<double>(value));
  uint32_t low = 0;
  uint32_t high = 0x7c00;
  const auto at = [](uint32_t half) {
    return half == 0x7c00 ? 65536.0
                          : static_cast<double>(fp16_to_fp32(static_cast<uint16_t>(half)));
  };
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (at(middle) <= magnitude ? low : high) = middle;
  }
  const double down = magnitude - at(low);
  const double up = at(high) - magnitude;
  const bool take_high = up < down || (up == down && (high & 1) == 0);
  return static_cast<uint16_t>(sign | (take_high ? high : low));
}

}  // namespace

TEST_CASE("fp16 widens to sign, exponent and mantissa") {
  CHECK(fp16_to_fp32(uint16_t{0x3c00}) == 1.0f);
  CHECK(fp16_to_fp32(uint16_t{0xc000}) == -2.0f);
  CHECK(fp16_to_fp32(uint16_t{0x7bff}) == 65504.0f);
  CHECK(fp16_to_fp32(uint16_t{0x0001}) == std::ldexp(1.0f, -24));
  CHECK(fp16_to_fp32(uint16_t{0x0400}) == std::ldexp(1.0f, -14));
  CHECK(float_bits(fp16_to_fp32(uint16_t{0x8000})) == 0x80000000u);
  CHECK(std::isinf(fp16_to_fp32(uint16_t{0xfc00})));
  CHECK(std::isnan(fp16_to_fp32(uint16_t{0x7c01})));
}

TEST_CASE("fp32 rounds to the nearest fp16, ties to even") {
  for (float value : hard_floats()) {
    if (!std::isnan(value)) {
      REQUIRE(fp32_to_fp16(value) == nearest_fp16(value));
    }
  }
  CHECK(fp32_to_fp16(65519.996f) == 0x7bff);
  CHECK(fp32_to_fp16(65520.0f) == 0x7c00);
}

TEST_CASE("fp32 rounds to the nearest bf16, ties to even, subnormals kept") {
  for (float value : hard_floats()) {
    if (std::isnan(value)) {
      continue;
    }
    const uint32_t bits = float_bits(value);
    const uint32_t low = bits >> 16;
    const uint32_t rest = bits & 0xffffu;
    const uint32_t up = rest > 0x8000u || (rest == 0x8000u && (low & 1u) != 0) ? 1 : 0;
    REQUIRE(fp32_to_bf16(value) == low + up);
  }
  CHECK(fp32_to_bf16(float_from_bits(0x00010000u)) == 1);
}

TEST_CASE("a NaN stays a NaN of its sign") {
  for (uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffc00000u}) {
    const float nan = float_from_bits(bits);
    CHECK(std::isnan(fp16_to_fp32(fp32_to_fp16(nan))));
    CHECK(std::isnan(bf16_to_fp32(fp32_to_bf16(nan))));
    CHECK((fp32_to_fp16(nan) & 0x8000u) == (bits >> 16 & 0x8000u));
    CHECK((fp32_to_bf16(nan) & 0x8000u) == (bits >> 16 & 0x8000u));
  }
}

TEST_CASE("rows convert to the same bits on every instruction set, NaN payloads too") {
  const std::vector<float> floats = hard_floats();
  std::vector<uint16_t> halves(0x10000);
  for (size_t i = 0; i < halves.size(); ++i) {
    halves[i] = static_cast<uint16_t>(i);
  }
  for (Isa isa : all_isas()) {
    CAPTURE(isa_name(isa));
    ScopedIsa scope(isa);
    for (size_t n : {size_t{0}, size_t{1}, size_t{7}, size_t{8}, size_t{15}, size_t{16}, size_t{31},
                     floats.size()}) {
      std::vector<uint16_t> fp16(n + 1, 0xabcd);
      std::vector<uint16_t> bf16(n + 1, 0xabcd);
      fp32_to_fp16(floats.data(), fp16.data(), static_cast<int64_t>(n));
      fp32_to_bf16(floats.data(), bf16.data(), static_cast<int64_t>(n));
      for (size_t i = 0; i < n; ++i) {
        REQUIRE(fp16[i] == fp32_to_fp16(floats[i]));
        REQUIRE(bf16[i] == fp32_to_bf16(floats[i]));
      }
      CHECK(fp16[n] == 0xabcd);
      CHECK(bf16[n] == 0xabcd);
    }
    for (size_t n : {size_t{3}, size_t{13}, size_t{21}, halves.size()}) {
      const size_t begin = halves.size() - n;
      std::vector<float> fp16(n + 1, 5.0f);
      std::vector<float> bf16(n + 1, 5.0f);
      fp16_to_fp32(halves.data() + begin, fp16.data(), static_cast<int64_t>(n));
      bf16_to_fp32(halves.data() + begin, bf16.data(), static_cast<int64_t>(n));
      for (size_t i = 0; i < n; ++i) {
        REQUIRE(float_bits(fp16[i]) == float_bits(fp16_to_fp32(halves[begin + i])));
        REQUIRE(float_bits(bf16[i]) == float_bits(bf16_to_fp32(halves[begin + i])));
      }
      CHECK(fp16[n] == 5.0f);
      CHECK(bf16[n] == 5.0f);
    }
  }
}
