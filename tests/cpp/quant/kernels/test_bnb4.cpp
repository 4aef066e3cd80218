#include <budwood/quant/error.h>
#include <budwood/quant/kernels/bnb4.h>
#include <doctest/doctest.h>

#include <algorithm>

#include "sha256.h"
#include "test_data.h"

using namespace budwood::quant::kernels;

namespace {

constexpr Bnb4Type kTypes[] = {Bnb4Type::nf4, Bnb4Type::fp4};

struct Packed {
  std::vector<uint8_t> codes;
  std::vector<float> absmax;

  Bnb4View view(Bnb4Type type, int64_t count, int64_t block_size) const {
    Bnb4View view;
    view.type = type;
    view.codes = codes.data();
    view.absmax = absmax.data();
    view.count = count;
    view.block_size = block_size;
    return view;
  }
};

Packed pack(Bnb4Type type, const std::vector<float>& src, int64_t block_size) {
  const auto n = static_cast<int64_t>(src.size());
  Packed packed;
  packed.codes.resize(static_cast<size_t>(bnb4_bytes(n)));
  packed.absmax.resize(static_cast<size_t>(bnb4_blocks(n, block_size)));
  REQUIRE(quantize_bnb4(type, src.data(), n, block_size, packed.codes.data(), packed.absmax.data())
              .ok());
  return packed;
}

std::vector<float> unpack(const Bnb4View& view, int64_t begin, int64_t n) {
  std::vector<float> values(static_cast<size_t>(n));
  dequantize_bnb4(view, begin, n, FloatType::fp32, values.data());
  return values;
}

std::vector<uint16_t> unpack_half(const Bnb4View& view, int64_t begin, int64_t n, FloatType type) {
  std::vector<uint16_t> values(static_cast<size_t>(n));
  dequantize_bnb4(view, begin, n, type, values.data());
  return values;
}

/// Element i by the definition.
float element(const Packed& packed, Bnb4Type type, int64_t block_size, int64_t i) {
  const uint8_t byte = packed.codes[static_cast<size_t>(i / 2)];
  const int code = i % 2 == 0 ? byte >> 4 : byte & 15;
  return bnb4_table(type)[code] * packed.absmax[static_cast<size_t>(i / block_size)];
}

}  // namespace

TEST_CASE("a ramp has bitsandbytes' codes and values") {
  for (Isa isa : all_isas()) {
    CAPTURE(isa_name(isa));
    ScopedIsa scope(isa);
    const Packed nf4 = pack(Bnb4Type::nf4, ramp(), 32);
    CHECK(hex(nf4.codes) == "00 01 11 12 23 34 45 66 78 99 ab bc cd de ee ff");
    CHECK(nf4.absmax == std::vector<float>{1.5f});
    const Bnb4View view = nf4.view(Bnb4Type::nf4, 32, 32);
    CHECK(sha256(unpack(view, 0, 32)) ==
          "d551e86ab3f67a74137a85c84d17f02dac31366f9adcd4d464660f9caf1d1acc");
    CHECK(unpack_half(view, 0, 8, FloatType::bf16) ==
          std::vector<uint16_t>{0xbfc0, 0xbfc0, 0xbfc0, 0xbf86, 0xbf86, 0xbf86, 0xbf86, 0xbf4a});
    const Packed fp4 = pack(Bnb4Type::fp4, ramp(), 32);
    CHECK(hex(fp4.codes) == "bb ba aa ad dd cc fe e9 01 66 74 45 55 22 22 33");
    CHECK(sha256(unpack(fp4.view(Bnb4Type::fp4, 32, 32), 0, 32)) ==
          "af762575762ddf210da1e81521655521b47b909e6729cd686086c05bb8ff6c5d");
  }
}

TEST_CASE("the NF4 values in order have the codes in order") {
  std::vector<float> values(bnb4_table(Bnb4Type::nf4), bnb4_table(Bnb4Type::nf4) + 16);
  CHECK(hex(pack(Bnb4Type::nf4, values, 32).codes) == "01 23 45 67 89 ab cd ef");
}

TEST_CASE("an odd count is padded with the code of zero") {
  std::vector<float> values(35, 1.0f);
  CHECK(pack(Bnb4Type::nf4, values, 32).codes.size() == 18);
  CHECK(pack(Bnb4Type::nf4, values, 32).codes.back() == 0xf7);
  CHECK(pack(Bnb4Type::fp4, values, 32).codes.back() == 0x30);
}

TEST_CASE("zeros: a full block keeps absmax 0, a short one stores the least absmax") {
  for (Isa isa : all_isas()) {
    ScopedIsa scope(isa);
    const Packed nf4 = pack(Bnb4Type::nf4, std::vector<float>(70, 0.0f), 64);
    CHECK(nf4.absmax == std::vector<float>{0.0f, 1e-38f});
    CHECK(nf4.codes == std::vector<uint8_t>(35, 0x77));
    CHECK(pack(Bnb4Type::fp4, std::vector<float>(64, -0.0f), 64).codes ==
          std::vector<uint8_t>(32, 0));
  }
}

TEST_CASE("a value on a threshold takes the lower code") {
  for (Isa isa : all_isas()) {
    ScopedIsa scope(isa);
    const float* table = bnb4_table(Bnb4Type::nf4);
    for (int i = 0; i < 15; ++i) {
      std::vector<float> block(32, 0.0f);
      block[0] = 1.0f;
      block[1] = (table[i] + table[i + 1]) / 2.0f;
      block[3] = std::nextafter(block[1], 2.0f);
      const Packed packed = pack(Bnb4Type::nf4, block, 32);
      CHECK((packed.codes[0] & 15) == i);
      CHECK((packed.codes[1] & 15) == i + 1);
    }
  }
}

TEST_CASE("codes are the nearest table entries") {
  for (Bnb4Type type : kTypes) {
    const std::vector<float> src = normal_floats(4096, 5);
    const Packed packed = pack(type, src, 64);
    for (int64_t i = 0; i < 4096; ++i) {
      const double absmax = packed.absmax[static_cast<size_t>(i / 64)];
      const double target = src[static_cast<size_t>(i)] / absmax;
      double best = 10.0;
      for (int c = 0; c < 16; ++c) {
        best = std::min(best, std::fabs(bnb4_table(type)[c] - target));
      }
      const double error = std::fabs(element(packed, type, 64, i) / absmax - target);
      REQUIRE(error == doctest::Approx(best).epsilon(1e-5));
    }
  }
}

TEST_CASE("blocks encode to the same bytes on every instruction set") {
  for (Bnb4Type type : kTypes) {
    for (int64_t block_size : {32, 64, 128, 256, 512, 1024, 2048, 4096}) {
      for (int64_t n : {int64_t{1}, int64_t{31}, block_size, 3 * block_size + 17, int64_t{10000}}) {
        std::vector<float> src = normal_floats(n, static_cast<uint32_t>(n + block_size));
        src[static_cast<size_t>(n / 2)] = 0.0f;
        Packed expected;
        {
          ScopedIsa scope(Isa::scalar);
          expected = pack(type, src, block_size);
        }
        for (Isa isa : wide_isas()) {
          ScopedIsa scope(isa);
          const Packed packed = pack(type, src, block_size);
          CHECK(packed.codes == expected.codes);
          CHECK(same_bits(packed.absmax, expected.absmax));
        }
      }
    }
  }
}

TEST_CASE("any range decodes to the definition, across blocks and inside bytes") {
  std::mt19937 generator(11);
  for (Bnb4Type type : kTypes) {
    for (int64_t block_size : {32, 64, 4096}) {
      const int64_t count = 9001;
      const Packed packed = pack(type, normal_floats(count, 21), block_size);
      const Bnb4View view = packed.view(type, count, block_size);
      for (int trial = 0; trial < 60; ++trial) {
        const int64_t begin = trial == 0 ? 0 : generator() % count;
        const int64_t room = count - begin;
        const int64_t n = trial == 0 ? count : std::min<int64_t>(room, generator() % (trial * 50));
        std::vector<float> expected;
        for (int64_t i = begin; i < begin + n; ++i) {
          expected.push_back(element(packed, type, block_size, i));
        }
        for (Isa isa : all_isas()) {
          CAPTURE(isa_name(isa));
          ScopedIsa scope(isa);
          CHECK(same_bits(unpack(view, begin, n), expected));
          const std::vector<uint16_t> bf16 = unpack_half(view, begin, n, FloatType::bf16);
          const std::vector<uint16_t> fp16 = unpack_half(view, begin, n, FloatType::fp16);
          bool rounded_once = true;
          for (size_t i = 0; i < expected.size(); ++i) {
            rounded_once = rounded_once && bf16[i] == fp32_to_bf16(expected[i]) &&
                           fp16[i] == fp32_to_fp16(expected[i]);
          }
          CHECK(rounded_once);
        }
      }
    }
  }
}

TEST_CASE("quantising in pieces that start at blocks gives the bytes of the whole") {
  const std::vector<float> src = normal_floats(1000, 8);
  const Packed whole = pack(Bnb4Type::nf4, src, 64);
  const Packed head = pack(Bnb4Type::nf4, {src.begin(), src.begin() + 512}, 64);
  const Packed rest = pack(Bnb4Type::nf4, {src.begin() + 512, src.end()}, 64);
  CHECK(std::equal(head.codes.begin(), head.codes.end(), whole.codes.begin()));
  CHECK(std::equal(rest.codes.begin(), rest.codes.end(), whole.codes.begin() + 256));
}

TEST_CASE("NaN and infinity are reported with their place, in full and short blocks") {
  for (Isa isa : all_isas()) {
    ScopedIsa scope(isa);
    for (size_t place : {size_t{0}, size_t{63}, size_t{64}, size_t{150}}) {
      std::vector<float> src = normal_floats(151, 2);
      src[place] = place % 2 == 0 ? std::nanf("") : -INFINITY;
      std::vector<uint8_t> codes(76);
      std::vector<float> absmax(3);
      const QuantizeStatus status =
          quantize_bnb4(Bnb4Type::nf4, src.data(), 151, 64, codes.data(), absmax.data());
      CHECK(status.fault == Fault::not_finite);
      CHECK(status.index == static_cast<int64_t>(place));
    }
  }
}

TEST_CASE("block sizes and ranges outside the format are refused") {
  float value = 0.0f;
  uint8_t code = 0;
  for (int64_t block_size : {0, 16, 48, 8192, -64}) {
    CHECK_THROWS_AS(quantize_bnb4(Bnb4Type::nf4, &value, 1, block_size, &code, &value),
                    budwood::Error);
  }
  const Packed packed = pack(Bnb4Type::nf4, normal_floats(100, 1), 64);
  const Bnb4View view = packed.view(Bnb4Type::nf4, 100, 64);
  CHECK_THROWS_AS(unpack(view, 90, 11), budwood::Error);
  CHECK_THROWS_AS(unpack(view, -1, 2), budwood::Error);
}

TEST_CASE("the dynamic map is bitsandbytes'") {
  const float* map = dynamic_map();
  CHECK(sha256(map, 1024) == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c");
  CHECK(float_bits(map[0]) == 0xbf7e3333u);
  CHECK(map[127] == 0.0f);
  CHECK(map[128] == doctest::Approx(5.5e-07));
  CHECK(map[255] == 1.0f);
  CHECK(std::is_sorted(map, map + 256));
}

TEST_CASE("absmax quantises twice to bitsandbytes' codes and reads back") {
  const std::vector<float> absmax = {0.5f, 1.0f, 1.25f, 3.0f};
  std::vector<uint8_t> codes(4);
  float nested = 0.0f;
  const float offset = 1.4375f;  // their mean
  REQUIRE(quantize_absmax(absmax.data(), 4, offset, codes.data(), &nested).ok());
  CHECK(codes == std::vector<uint8_t>{28, 51, 62, 255});
  CHECK(nested == 1.5625f);
  NestedAbsmax view;
  view.codes = codes.data();
  view.map = dynamic_map();
  view.absmax = &nested;
  view.offset = offset;
  std::vector<float> back(4);
  dequantize_absmax(view, 0, 4, back.data());
  CHECK(back == std::vector<float>{0.501220763f, 1.0065918f, 1.24829102f, 3.0f});
}

TEST_CASE("equal absmax values survive the second quantisation") {
  const std::vector<float> absmax(300, 0.125f);
  std::vector<uint8_t> codes(300);
  std::vector<float> nested(2);
  REQUIRE(quantize_absmax(absmax.data(), 300, 0.125f, codes.data(), nested.data()).ok());
  CHECK(codes == std::vector<uint8_t>(300, 127));
  CHECK(nested == std::vector<float>{0.0f, 0.0f});
}

TEST_CASE("a weight with nested absmax decodes as one with the absmax read back") {
  const int64_t count = 64 * 700 + 5;
  const Packed packed = pack(Bnb4Type::nf4, normal_floats(count, 31), 64);
  const int64_t blocks = bnb4_blocks(count, 64);
  std::vector<uint8_t> codes(static_cast<size_t>(blocks));
  std::vector<float> nested(3);
  double sum = 0.0;
  for (const float value : packed.absmax) sum += value;
  const auto offset = static_cast<float>(sum / static_cast<double>(blocks));
  REQUIRE(quantize_absmax(packed.absmax.data(), blocks, offset, codes.data(), nested.data()).ok());
  Bnb4View view = packed.view(Bnb4Type::nf4, count, 64);
  view.nested = {codes.data(), dynamic_map(), nested.data(), offset, 256};
  view.absmax = nullptr;
  Packed plain = packed;
  dequantize_absmax(view.nested, 0, blocks, plain.absmax.data());
  const Bnb4View plain_view = plain.view(Bnb4Type::nf4, count, 64);
  CHECK(same_bits(unpack(view, 0, count), unpack(plain_view, 0, count)));
  CHECK(same_bits(unpack(view, 16301, 20000), unpack(plain_view, 16301, 20000)));
  for (int64_t b = 0; b < blocks; ++b) {
    const auto i = static_cast<size_t>(b);
    REQUIRE(std::fabs(plain.absmax[i] - packed.absmax[i]) < 0.01f * nested[i / 256]);
  }
}

TEST_CASE("a NaN among the absmax values is reported") {
  const float absmax[3] = {1.0f, std::nanf(""), 2.0f};
  uint8_t codes[3];
  float nested = 0.0f;
  CHECK(quantize_absmax(absmax, 3, 1.0f, codes, &nested).index == 1);
}
