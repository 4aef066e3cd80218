#include <budwood/quant/error.h>
#include <budwood/quant/kernels/gguf_blocks.h>
#include <budwood/quant/kernels/half.h>
#include <doctest/doctest.h>

#include <limits>

#include "sha256.h"
#include "test_data.h"

using namespace budwood::quant::kernels;

namespace {

constexpr GgmlType kAllTypes[] = {GgmlType::f32,  GgmlType::f16,  GgmlType::bf16, GgmlType::q4_0,
                                  GgmlType::q4_1, GgmlType::q5_0, GgmlType::q5_1, GgmlType::q8_0,
                                  GgmlType::q4_k, GgmlType::q5_k, GgmlType::q6_k};
constexpr GgmlType kWritable[] = {GgmlType::f32,  GgmlType::f16,  GgmlType::bf16,
                                  GgmlType::q4_0, GgmlType::q4_1, GgmlType::q8_0};

std::vector<uint8_t> quantized(GgmlType type, const std::vector<float>& src) {
  const auto n = static_cast<int64_t>(src.size());
  std::vector<uint8_t> bytes(static_cast<size_t>(row_bytes(type, n)));
  REQUIRE(quantize_row(type, src.data(), bytes.data(), n).ok());
  return bytes;
}

std::vector<float> dequantized(GgmlType type, const std::vector<uint8_t>& bytes) {
  const int64_t n = static_cast<int64_t>(bytes.size()) / ggml_type_traits(type).block_bytes *
                    ggml_type_traits(type).block;
  std::vector<float> values(static_cast<size_t>(n));
  dequantize_row(type, bytes.data(), values.data(), n);
  return values;
}

/// A block with byte i = 37 i + 11 and given fp16 scales.
std::vector<uint8_t> patterned_block(GgmlType type) {
  std::vector<uint8_t> block(static_cast<size_t>(ggml_type_traits(type).block_bytes));
  for (size_t i = 0; i < block.size(); ++i) {
    block[i] = static_cast<uint8_t>(37 * i + 11);
  }
  const uint8_t scales[4] = {0x00, 0x2c, 0x00, 0x28};
  if (type == GgmlType::q6_k) {
    std::memcpy(block.data() + 208, scales, 2);
  } else {
    std::memcpy(block.data(), scales, 4);
  }
  return block;
}

QuantizeStatus status_of(GgmlType type, const std::vector<float>& src) {
  std::vector<uint8_t> bytes(src.size() * 4);
  return quantize_row(type, src.data(), bytes.data(), static_cast<int64_t>(src.size()));
}

}  // namespace

TEST_CASE("blocks of a ramp have ggml's bytes") {
  for (Isa isa : all_isas()) {
    ScopedIsa scope(isa);
    CHECK(hex(quantized(GgmlType::q4_0, ramp())) ==
          "00 32 80 91 91 a2 a2 b3 b3 c4 c4 d5 d5 e6 e6 f7 f7 f8");
    CHECK(hex(quantized(GgmlType::q4_1, ramp())) ==
          "33 32 00 be 80 80 91 91 a2 a2 b3 b3 c4 c4 d5 d5 e6 e6 f7 f7");
    CHECK(
        hex(quantized(GgmlType::q8_0, ramp())) ==
        "0c 22 81 89 91 99 a1 a9 b1 b9 c0 c8 d0 d8 e0 e8 f0 f8 00 08 10 18 20 28 30 38 40 47 4f 57 "
        "5f 67 6f 77");
    const std::vector<float> q4_0 = dequantized(GgmlType::q4_0, quantized(GgmlType::q4_0, ramp()));
    CHECK(std::vector<float>(q4_0.begin(), q4_0.begin() + 4) ==
          std::vector<float>{-1.5f, -1.3125f, -1.3125f, -1.125f});
    CHECK(q4_0.back() == 1.3125f);
    const std::vector<float> q4_1 = dequantized(GgmlType::q4_1, quantized(GgmlType::q4_1, ramp()));
    CHECK(q4_1[2] == -1.30627441f);
    CHECK(q4_1.back() == 1.40588379f);
    const std::vector<float> q8_0 = dequantized(GgmlType::q8_0, quantized(GgmlType::q8_0, ramp()));
    CHECK(q8_0[0] == -1.49990845f);
    CHECK(q8_0[1] == -1.40542603f);
    CHECK(q8_0.back() == 1.40542603f);
  }
}

TEST_CASE("five-bit blocks of a ramp decode to it exactly") {
  std::vector<uint8_t> q5_0 = {0x00, 0x2e, 0x00, 0x00, 0xff, 0xff};
  std::vector<uint8_t> q5_1 = {0x00, 0x2e, 0x00, 0xbe, 0x00, 0x00, 0xff, 0xff};
  for (int i = 0; i < 16; ++i) {
    q5_0.push_back(static_cast<uint8_t>(17 * i));
    q5_1.push_back(static_cast<uint8_t>(17 * i));
  }
  for (Isa isa : all_isas()) {
    ScopedIsa scope(isa);
    CHECK(same_bits(dequantized(GgmlType::q5_0, q5_0), ramp()));
    CHECK(same_bits(dequantized(GgmlType::q5_1, q5_1), ramp()));
  }
}

TEST_CASE("K blocks decode to the values of ggml's C code") {
  struct Golden {
    GgmlType type;
    float first[4];
    float last;
    const char* digest;
  };
  const Golden goldens[] = {
      {GgmlType::q4_k,
       {19.71875f, -1.59375f, 8.09375f, 17.78125f},
       3.03125f,
       "4f3987f514b163ce328aa5af0ecbbc46a35ff8d4f584c2bfc7241e4c2627f68c"},
      {GgmlType::q5_k,
       {50.71875f, -1.59375f, 39.09375f, 17.78125f},
       6.78125f,
       "ae3c5b2b2c7bd4a15c23bf8df226cea3a5c7f2482f155ab310ef29342989e48a"},
      {GgmlType::q6_k,
       {-89.4375f, 106.0f, 36.4375f, -33.125f},
       -3.75f,
       "32858e62a6851bc88ca6f8c0282f3c10c0774c3feabac43e920839414f07c04a"},
  };
  for (const Golden& golden : goldens) {
    CAPTURE(ggml_type_name(golden.type));
    for (Isa isa : all_isas()) {
      CAPTURE(isa_name(isa));
      ScopedIsa scope(isa);
      const std::vector<float> values = dequantized(golden.type, patterned_block(golden.type));
      for (size_t i = 0; i < 4; ++i) {
        CHECK(values[i] == golden.first[i]);
      }
      CHECK(values.back() == golden.last);
      CHECK(sha256(values) == golden.digest);
    }
  }
}

TEST_CASE("any bytes decode alike on every instruction set, from any address") {
  for (GgmlType type : kAllTypes) {
    CAPTURE(ggml_type_name(type));
    for (int64_t blocks : {1, 2, 3, 64, 257}) {
      const int64_t n = blocks * ggml_type_traits(type).block;
      const std::vector<uint8_t> bytes = random_bytes(
          blocks * ggml_type_traits(type).block_bytes + 1, static_cast<uint32_t>(blocks));
      std::vector<float> expected(static_cast<size_t>(n));
      {
        ScopedIsa scope(Isa::scalar);
        dequantize_row(type, bytes.data() + 1, expected.data(), n);
      }
      for (Isa isa : wide_isas()) {
        CAPTURE(isa_name(isa));
        ScopedIsa scope(isa);
        std::vector<float> values(static_cast<size_t>(n));
        dequantize_row(type, bytes.data() + 1, values.data(), n);
        CHECK(same_values(values, expected));
      }
    }
  }
}

TEST_CASE("rows encode to the same bytes on every instruction set") {
  std::vector<std::vector<float>> rows;
  for (uint32_t seed = 0; seed < 8; ++seed) {
    rows.push_back(normal_floats(4096, seed, std::pow(10.0f, static_cast<float>(seed) - 5.0f)));
  }
  // Ties: multiples of an exact half step; equal magnitudes of both signs; zeros of both signs.
  std::mt19937 generator(7);
  for (float step : {0.5f, 1.0f, 127.0f, 0.0f}) {
    std::vector<float> row(4096);
    for (float& value : row) {
      value = static_cast<float>(static_cast<int>(generator() % 31) - 15) * step;
      value = generator() % 16 == 0 ? -0.0f : value;
    }
    rows.push_back(row);
  }
  rows.push_back(normal_floats(4096, 99, 1e-38f));
  rows.push_back(normal_floats(4096, 98, 1e-42f));
  for (const std::vector<float>& row : rows) {
    for (GgmlType type : kWritable) {
      CAPTURE(ggml_type_name(type));
      std::vector<uint8_t> expected;
      {
        ScopedIsa scope(Isa::scalar);
        expected = quantized(type, row);
      }
      for (Isa isa : wide_isas()) {
        CAPTURE(isa_name(isa));
        ScopedIsa scope(isa);
        CHECK(quantized(type, row) == expected);
      }
    }
  }
}

TEST_CASE("a block of zeros is written as ggml writes it") {
  const std::vector<float> zeros(32, 0.0f);
  const std::vector<float> minus(32, -0.0f);
  for (Isa isa : all_isas()) {
    ScopedIsa scope(isa);
    std::vector<uint8_t> q4_0(18, 0x88);
    q4_0[0] = 0x00;
    q4_0[1] = 0x80;
    CHECK(quantized(GgmlType::q4_0, zeros) == q4_0);
    CHECK(quantized(GgmlType::q4_0, minus) == q4_0);
    CHECK(quantized(GgmlType::q8_0, zeros) == std::vector<uint8_t>(34, 0));
    CHECK(quantized(GgmlType::q4_1, zeros) == std::vector<uint8_t>(20, 0));
  }
}

TEST_CASE("quantising reports the first NaN or infinity and what fp16 cannot hold") {
  for (Isa isa : all_isas()) {
    ScopedIsa scope(isa);
    for (GgmlType type : kWritable) {
      CAPTURE(ggml_type_name(type));
      for (float bad : {std::nanf(""), -std::numeric_limits<float>::infinity()}) {
        std::vector<float> row = normal_floats(96, 3);
        row[70] = bad;
        row[90] = bad;
        const QuantizeStatus status = status_of(type, row);
        CHECK(status.fault == Fault::not_finite);
        CHECK(status.index == 70);
      }
    }
    std::vector<float> row = normal_floats(96, 4);
    row[40] = 65520.0f;
    CHECK(status_of(GgmlType::f16, row).fault == Fault::out_of_range);
    CHECK(status_of(GgmlType::f16, row).index == 40);
    CHECK(status_of(GgmlType::q4_0, row).ok());
    row[41] = -3e38f;
    for (GgmlType type : {GgmlType::q4_0, GgmlType::q4_1, GgmlType::q8_0}) {
      CHECK(status_of(type, row).fault == Fault::out_of_range);
      CHECK(status_of(type, row).index == 41);
    }
    CHECK(status_of(GgmlType::bf16, row).ok());
    row[42] = std::numeric_limits<float>::max();
    CHECK(status_of(GgmlType::bf16, row).index == 42);
    CHECK(status_of(GgmlType::f32, row).ok());
  }
}

TEST_CASE("unknown types, partial blocks and types that cannot be written are refused by name") {
  float values[256] = {};
  uint8_t bytes[256] = {};
  CHECK_THROWS_WITH_AS(
      dequantize_row(GgmlType::q4_0, bytes, values, 33),
      doctest::Contains("33 elements of Q4_0; wanted a multiple of its block of 32"),
      budwood::Error);
  CHECK_THROWS_WITH_AS(dequantize_row(static_cast<GgmlType>(16), bytes, values, 256),
                       doctest::Contains("IQ2_XXS"), budwood::Error);
  CHECK_THROWS_AS(row_bytes(GgmlType::q4_k, -256), budwood::Error);
  CHECK_THROWS_WITH_AS(quantize_row(GgmlType::q6_k, values, bytes, 256),
                       doctest::Contains("Q6_K can be read but not written"), budwood::Error);
}
