#include <budwood/quant/error.h>
#include <budwood/quant/kernels/bnb4.h>
#include <budwood/quant/kernels/bnb4_paths.h>
#include <budwood/quant/kernels/device/bnb4_device.h>
#include <budwood/quant/kernels/isa.h>
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <initializer_list>

namespace budwood::quant::kernels {
namespace {

struct Type {
  Bnb4Table table;
  Bnb4Encoding encoding;

  explicit Type(Bnb4Type type) {
    for (int i = 0; i < 16; ++i) {
      table.entries[i] = bnb4_value(type, i);
      const auto bits = std::bit_cast<uint32_t>(table.entries[i]);
      for (int k = 0; k < 4; ++k) {
        table.planes[k][i] = static_cast<uint8_t>(bits >> (8 * k));
      }
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
  return type_of(type).table.entries;
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

void dequantize_bnb4_tile(const Bnb4View& weight, int64_t cols, int64_t row, int64_t rows,
                          int64_t col, int64_t n, float* dst, int64_t stride) {
  check_block_size("dequantize_bnb4_tile", weight.block_size);
  if (row < 0 || rows < 0 || col < 0 || n < 0 || col > cols - n ||
      row > weight.count / std::max<int64_t>(1, cols) - rows) {
    throw Error("dequantize_bnb4_tile",
                fmt::format("rows [{}, {}), columns [{}, {}) of a weight of {} with {} columns",
                            row, row + rows, col, col + n, weight.count, cols));
  }
  constexpr int64_t kChunk = 1024;
  float scales[kChunk / 32 + 1];
  const int shift = std::countr_zero(static_cast<uint64_t>(weight.block_size));
  const Bnb4Table& table = type_of(weight.type).table;
  const auto decode = path().decode;
  const NestedAbsmax& nested = weight.nested;
  const auto outer = static_cast<uint64_t>(nested.block_size);
  const bool in_line = weight.absmax == nullptr && nested.absmax != nullptr &&
                       nested.codes != nullptr && nested.map != nullptr &&
                       std::has_single_bit(outer);
  const int outer_shift = std::countr_zero(outer);
  for (int64_t r = row; r < row + rows; ++r, dst += stride) {
    for (int64_t done = 0; done < n; done += kChunk) {
      const int64_t here = std::min(n - done, kChunk);
      const int64_t begin = r * cols + col + done;
      const int64_t block = begin >> shift;
      const float* absmax = scales;
      const int64_t count = ((begin + here - 1) >> shift) - block + 1;
      if (weight.absmax != nullptr) {
        absmax = weight.absmax + block;
      } else if (in_line) {  // dequantize_absmax, whose checks cost more than a short piece
        for (int64_t i = 0; i < count; ++i) {
          scales[i] =
              nested.map[nested.codes[block + i]] * nested.absmax[(block + i) >> outer_shift] +
              nested.offset;
        }
      } else {
        dequantize_absmax(nested, block, count, scales);
      }
      decode(table, weight.codes, absmax, weight.block_size, begin, here, dst + done);
    }
  }
}

bool dot_bnb4(const Bnb4View& weight, int64_t cols, int64_t row, int64_t col, int64_t n,
              const float* x, float* out) {
  constexpr int64_t kGroup = 64;
  constexpr int64_t kGroups = 16;
  if (path().dot == nullptr || weight.block_size < kGroup || cols % kGroup != 0 ||
      col % kGroup != 0 || n % kGroup != 0 || n > kGroup * kGroups) {
    return false;
  }
  const int shift = std::countr_zero(static_cast<uint64_t>(weight.block_size));
  const uint8_t* codes[4];
  const float* scales[4];
  float expanded[4][kGroups];
  for (int64_t r = 0; r < 4; ++r) {
    const int64_t begin = (row + r) * cols + col;
    codes[r] = weight.codes + begin / 2;
    scales[r] = expanded[r];
    if (weight.absmax != nullptr && weight.block_size == kGroup) {
      scales[r] = weight.absmax + (begin >> shift);
    } else if (weight.block_size == kGroup) {
      dequantize_absmax(weight.nested, begin >> shift, n / kGroup, expanded[r]);
    } else {
      for (int64_t g = 0; g < n / kGroup; ++g) {
        const int64_t block = (begin + g * kGroup) >> shift;
        if (weight.absmax != nullptr) {
          expanded[r][g] = weight.absmax[block];
        } else {
          dequantize_absmax(weight.nested, block, 1, &expanded[r][g]);
        }
      }
    }
  }
  path().dot(type_of(weight.type).table, codes, scales, n / kGroup, x, out);
  return true;
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
  const Bnb4Table& table = type_of(weight.type).table;
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
