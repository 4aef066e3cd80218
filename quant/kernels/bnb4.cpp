#include <budwood/quant/error.h>
#include <budwood/quant/kernels/bnb4.h>
#include <budwood/quant/kernels/bnb4_paths.h>
#include <budwood/quant/kernels/isa.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>

namespace budwood::quant::kernels {
namespace {

// Bits, not decimals: a decimal literal may land one unit away.
constexpr uint32_t kNf4Bits[16] = {
    0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x00000000,
    0x3da2faff, 0x3e24cae3, 0x3e7c04dd, 0x3ead033a, 0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000};
// The magnitudes 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4, then the same negative, but for +0 at 8.
constexpr uint32_t kFp4Bits[16] = {
    0x00000000, 0x3baaaaab, 0x3f2aaaab, 0x3f800000, 0x3eaaaaab, 0x3f000000, 0x3e2aaaab, 0x3e800000,
    0x00000000, 0xbbaaaaab, 0xbf2aaaab, 0xbf800000, 0xbeaaaaab, 0xbf000000, 0xbe2aaaab, 0xbe800000};
constexpr int32_t kNf4Order[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr int32_t kFp4Order[16] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};

struct Type {
  float table[16];
  Bnb4Encoding encoding;

  Type(const uint32_t* bits, const int32_t* order) {
    for (int i = 0; i < 16; ++i) {
      table[i] = float_from_bits(bits[i]);
      encoding.order[i] = order[i];
    }
    for (int i = 0; i < 15; ++i) {
      encoding.thresholds[i] = (table[order[i]] + table[order[i + 1]]) / 2.0f;
    }
    encoding.thresholds[15] = 0.0f;
  }
};

const Type& type_of(Bnb4Type type) {
  static const Type nf4(kNf4Bits, kNf4Order);
  static const Type fp4(kFp4Bits, kFp4Order);
  return type == Bnb4Type::nf4 ? nf4 : fp4;
}

const Bnb4Path& path() {
  return active_path(kBnb4Scalar, kBnb4Avx2, kBnb4Avx512);
}

void check_block_size(const char* where, int64_t block_size) {
  if (!is_bnb4_block_size(block_size)) {
    throw Error(where,
                fmt::format("block size {}; wanted a power of two from 32 to 4096", block_size));
  }
}

QuantizeStatus first_not_finite(const float* src, int64_t begin, int64_t end) {
  int64_t i = begin;
  while (i < end && std::isfinite(src[i])) {
    ++i;
  }
  return {Fault::not_finite, i};
}

}  // namespace

const float* bnb4_table(Bnb4Type type) {
  return type_of(type).table;
}

bool is_bnb4_block_size(int64_t block_size) {
  return block_size >= 32 && block_size <= 4096 && (block_size & (block_size - 1)) == 0;
}

QuantizeStatus quantize_bnb4(Bnb4Type type, const float* src, int64_t n, int64_t block_size,
                             uint8_t* codes, float* absmax) {
  check_block_size("quantize_bnb4", block_size);
  const Bnb4Encoding& encoding = type_of(type).encoding;
  const auto encode = path().encode;
  int64_t begin = 0;
  for (; begin + block_size <= n; begin += block_size) {
    if (!encode(encoding, src + begin, block_size, codes + begin / 2, absmax++)) {
      return first_not_finite(src, begin, begin + block_size);
    }
  }
  if (begin < n && !encode_bnb4_tail(encoding, src + begin, n - begin, codes + begin / 2, absmax)) {
    return first_not_finite(src, begin, n);
  }
  return {};
}

void dequantize_bnb4(const Bnb4View& weight, int64_t begin, int64_t n, FloatType out, void* dst) {
  check_block_size("dequantize_bnb4", weight.block_size);
  if (begin < 0 || n < 0 || begin > weight.count - n) {
    throw Error("dequantize_bnb4",
                fmt::format("elements [{}, {}) of a weight of {}", begin, begin + n, weight.count));
  }
  constexpr int64_t kChunk = 1024;
  float scales[kChunk / 32 + 1];
  float values[kChunk];
  const float* table = bnb4_table(weight.type);
  const auto decode = path().decode;
  auto* bytes = static_cast<char*>(dst);
  while (n > 0) {
    const int64_t here = std::min(n, kChunk);
    const int64_t block = begin / weight.block_size;
    const float* absmax = scales;
    if (weight.absmax != nullptr) {
      absmax = weight.absmax + block;
    } else {
      const int64_t last = (begin + here - 1) / weight.block_size;
      dequantize_absmax(weight.nested, block, last - block + 1, scales);
    }
    if (out == FloatType::fp32) {
      decode(table, weight.codes, absmax, weight.block_size, begin, here,
             reinterpret_cast<float*>(bytes));
    } else {
      decode(table, weight.codes, absmax, weight.block_size, begin, here, values);
      fp32_to(out, values, bytes, here);
    }
    begin += here;
    n -= here;
    bytes += here * float_bytes(out);
  }
}

}  // namespace budwood::quant::kernels
