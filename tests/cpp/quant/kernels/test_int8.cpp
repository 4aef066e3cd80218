#include <budwood/quant/kernels/int8.h>
#include <doctest/doctest.h>

#include "test_data.h"

using namespace budwood::quant::kernels;

namespace {

struct Row {
  std::vector<int8_t> codes;
  float scb = -1.0f;
};

Row quantized(const std::vector<float>& src) {
  Row row;
  row.codes.resize(src.size());
  REQUIRE(
      quantize_int8_row(src.data(), static_cast<int64_t>(src.size()), row.codes.data(), &row.scb)
          .ok());
  return row;
}

std::vector<float> dequantized(const Row& row) {
  std::vector<float> values(row.codes.size());
  dequantize_int8_row(row.codes.data(), row.scb, static_cast<int64_t>(values.size()),
                      FloatType::fp32, values.data());
  return values;
}

}  // namespace

TEST_CASE("int8 rows have bitsandbytes' codes and values") {
  for (Isa isa : all_isas()) {
    ScopedIsa scope(isa);
    const Row row = quantized({1, -2, 3, -4, 5, -6});
    CHECK(row.codes == std::vector<int8_t>{21, -42, 64, -85, 106, -127});
    CHECK(row.scb == 6.0f);
    CHECK(dequantized(row) == std::vector<float>{0.992125988f, -1.98425198f, 3.02362204f,
                                                 -4.01574802f, 5.00787401f, -6.0f});
    const Row second = quantized({0.5f, 0.25f, -0.125f, 1, 0, 0.75f});
    CHECK(second.codes == std::vector<int8_t>{64, 32, -16, 127, 0, 95});
    CHECK(second.scb == 1.0f);
  }
}

TEST_CASE("a tie in decimals falls where fp32(1 / scb) * 127 puts it") {
  // 0.5 * 127 = 63.5 in decimals, and 63.5 + 2^-18 and 63.5 - 2^-18 in bitsandbytes.
  for (Isa isa : all_isas()) {
    ScopedIsa scope(isa);
    CHECK(quantized({1.880859375f, -3.76171875f}).codes == std::vector<int8_t>{64, -127});
    CHECK(quantized({2.109375f, 4.21875f}).codes == std::vector<int8_t>{63, 127});
  }
}

TEST_CASE("a row of zeros and a row of tiny values stay what they are") {
  for (Isa isa : all_isas()) {
    ScopedIsa scope(isa);
    const Row zeros = quantized(std::vector<float>(40, 0.0f));
    CHECK(zeros.scb == 0.0f);
    CHECK(zeros.codes == std::vector<int8_t>(40, 0));
    CHECK(quantized({1e-40f, -1e-40f, 0.5e-40f, 0}).codes == std::vector<int8_t>{127, -127, 64, 0});
  }
}

TEST_CASE("int8 rows agree bit for bit on every instruction set") {
  for (int64_t n : {1, 7, 8, 15, 16, 17, 63, 1000, 4097}) {
    std::vector<float> src = normal_floats(n, static_cast<uint32_t>(n));
    // Multiples of a half step: ties.
    for (size_t i = 0; i < src.size(); i += 3) {
      src[i] = std::round(src[i] * 8.0f) / 8.0f;
    }
    src[0] = 127.0f / 16.0f;
    ScopedIsa scope(Isa::scalar);
    const Row expected = quantized(src);
    const std::vector<float> values = dequantized(expected);
    for (Isa isa : wide_isas()) {
      ScopedIsa wide(isa);
      const Row row = quantized(src);
      CHECK(row.codes == expected.codes);
      CHECK(row.scb == expected.scb);
      CHECK(same_bits(dequantized(row), values));
      std::vector<uint16_t> halves(src.size());
      dequantize_int8_row(row.codes.data(), row.scb, n, FloatType::bf16, halves.data());
      bool rounded_once = true;
      for (size_t i = 0; i < halves.size(); ++i) {
        rounded_once = rounded_once && halves[i] == fp32_to_bf16(values[i]);
      }
      CHECK(rounded_once);
    }
  }
}

TEST_CASE("int8 quantising reports NaN and infinity with their place") {
  for (Isa isa : all_isas()) {
    ScopedIsa scope(isa);
    std::vector<float> src = normal_floats(50, 1);
    src[33] = -INFINITY;
    src[40] = std::nanf("");
    std::vector<int8_t> codes(50);
    float scb = 0.0f;
    const QuantizeStatus status = quantize_int8_row(src.data(), 50, codes.data(), &scb);
    CHECK(status.fault == Fault::not_finite);
    CHECK(status.index == 33);
  }
}
