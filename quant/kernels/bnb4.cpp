#include <budwood/quant/error.h>
#include <budwood/quant/kernels/bnb4.h>
#include <budwood/quant/kernels/bnb4_paths.h>
#include <budwood/quant/kernels/device/bnb4_device.h>
#include <budwood/quant/kernels/isa.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>

namespace budwood::quant::kernels {
namespace {

struct Type {
  float table[16];
  Bnb4Encoding encoding;

  explicit Type(Bnb4Type type) {
    for (int i = 0; i < 16; ++i) {
      table[i] = bnb4_value(type, i);
      encoding.order[i] = bnb4_code_by_size(type, i);
      encoding.thresholds[i] = i < 15 ? bnb4_threshold(type, i) : 0.0f;
    }
  }
};

const Type& type_of(Bnb4Type type) {
  static const Type nf4(Bnb4Type::nf4);
  static const Type fp4(Bnb4Type::fp4);
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
