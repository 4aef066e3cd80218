#include <doctest/doctest.h>

#include <algorithm>
#include <array>

#include "device_rows.h"

using namespace budwood::quant::kernels;

namespace {

struct Coded {
  std::vector<uint8_t> codes;
  std::vector<float> absmax;
  int64_t bad = -1;
};

Coded blank(int64_t n, int64_t size) {
  return {std::vector<uint8_t>(static_cast<size_t>(bnb4_bytes(n))),
          std::vector<float>(static_cast<size_t>(bnb4_blocks(n, size)))};
}

Coded on_cpu(Bnb4Type type, const std::vector<float>& src, int64_t size) {
  ScopedIsa scope(Isa::scalar);
  const auto n = static_cast<int64_t>(src.size());
  Coded result = blank(n, size);
  result.bad =
      quantize_bnb4(type, src.data(), n, size, result.codes.data(), result.absmax.data()).index;
  return result;
}

Coded on_device(Bnb4Type type, const ConstFloats& src, int64_t n, int64_t size) {
  Coded result = blank(n, size);
  result.bad = encode_on_host({.type = type, .values = src, .count = n, .block_size = size},
                              result.codes.data(), result.absmax.data());
  return result;
}

void check_same(const Coded& found, const Coded& wanted) {
  CHECK(found.bad == wanted.bad);
  CHECK(found.codes == wanted.codes);
  CHECK(same_bits(found.absmax, wanted.absmax));
}

}  // namespace

TEST_CASE("device threads encode nf4 and fp4 to the CPU's bytes") {
  for (const Bnb4Type type : {Bnb4Type::nf4, Bnb4Type::fp4}) {
    for (const auto& [n, size] : std::vector<std::array<int64_t, 2>>{
             {64, 64}, {4096, 64}, {8192, 4096}, {1, 32}, {33, 32}, {1001, 128}, {5000, 4096}}) {
      CAPTURE(n);
      CAPTURE(size);
      std::vector<float> src = normal_floats(n, static_cast<uint32_t>(n + size));
      // Values at the thresholds themselves, and a block of zeros.
      for (int t = 0; t < 15 && n >= 64; ++t) {
        src[static_cast<size_t>(2 * t)] = bnb4_threshold(type, t);
      }
      src[0] = 1.0f;
      if (n >= 2 * size) {
        std::fill_n(src.begin() + size, size, 0.0f);
        src[static_cast<size_t>(size) + 1] = -0.0f;
      }
      check_same(on_device(type, {src.data(), FloatType::fp32}, n, size), on_cpu(type, src, size));

      for (const FloatType half : {FloatType::bf16, FloatType::fp16}) {
        std::vector<uint16_t> halves(src.size());
        fp32_to(half, src.data(), halves.data(), n);
        std::vector<float> widened(src.size());
        half == FloatType::bf16 ? bf16_to_fp32(halves.data(), widened.data(), n)
                                : fp16_to_fp32(halves.data(), widened.data(), n);
        check_same(on_device(type, {halves.data(), half}, n, size), on_cpu(type, widened, size));
      }
    }
    for (const float tiny : {1e-40f, 1e-38f, 3e38f}) {
      std::vector<float> src = normal_floats(96, 9);
      for (float& value : src) {
        value = value / 4.0f * tiny;
      }
      check_same(on_device(type, {src.data(), FloatType::fp32}, 96, 64), on_cpu(type, src, 64));
    }
  }
}

TEST_CASE("device threads find the first value that is not finite") {
  for (const int64_t place : {0, 63, 64, 200, 299}) {
    std::vector<float> src = normal_floats(300, 1);
    src[static_cast<size_t>(place)] = place % 2 == 0 ? INFINITY : std::nanf("");
    src[299] = -INFINITY;
    CHECK(on_device(Bnb4Type::nf4, {src.data(), FloatType::fp32}, 300, 64).bad == place);
  }
}
