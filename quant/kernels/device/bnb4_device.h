#pragma once

#include <budwood/quant/kernels/bnb4.h>
#include <budwood/quant/kernels/device/floats.h>

/// NF4 and FP4 (bnb4.h) for one thread.
namespace budwood::quant::kernels {

/// The value of a code. Bits, not decimals: a decimal literal may land one unit away.
BUDWOOD_HOST_DEVICE inline float bnb4_value(Bnb4Type type, int code) {
  constexpr uint32_t nf4[16] = {0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0,
                                0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x00000000,
                                0x3da2faff, 0x3e24cae3, 0x3e7c04dd, 0x3ead033a,
                                0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000};
  // The magnitudes 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4, then the same negative, but for +0 at 8.
  constexpr uint32_t fp4[16] = {0x00000000, 0x3baaaaab, 0x3f2aaaab, 0x3f800000,
                                0x3eaaaaab, 0x3f000000, 0x3e2aaaab, 0x3e800000,
                                0x00000000, 0xbbaaaaab, 0xbf2aaaab, 0xbf800000,
                                0xbeaaaaab, 0xbf000000, 0xbe2aaaab, 0xbe800000};
  return float_from_bits(type == Bnb4Type::nf4 ? nf4[code] : fp4[code]);
}

/// The code of the i-th value by size.
BUDWOOD_HOST_DEVICE inline int bnb4_code_by_size(Bnb4Type type, int i) {
  constexpr uint8_t fp4[16] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};
  return type == Bnb4Type::nf4 ? i : fp4[i];
}

/// Halfway between the i-th value by size and the next.
BUDWOOD_HOST_DEVICE inline float bnb4_threshold(Bnb4Type type, int i) {
  const float sum = rounded_sum(bnb4_value(type, bnb4_code_by_size(type, i)),
                                bnb4_value(type, bnb4_code_by_size(type, i + 1)));
  return rounded_product(sum, 0.5f);
}

/// A weight [rows, cols] where it lies.
struct Bnb4Rows {
  static constexpr int kGap = 4;
  static constexpr int kTableSize = 16;
  /// What bitsandbytes groups the scales by.
  static constexpr int64_t kNestedBlock = 256;

  Bnb4Type type = Bnb4Type::nf4;
  int64_t rows = 0, cols = 0;
  int64_t block_size = 64;
  const int64_t* stated_block_size = nullptr;  ///< a check of block_size, or null
  const uint8_t* codes = nullptr;
  const float* absmax = nullptr;  ///< null: what follows is read
  const uint8_t* absmax_codes = nullptr;
  const float* map = nullptr;
  const float* nested_absmax = nullptr;
  const float* offset = nullptr;
  const float* table = nullptr;  ///< bnb4_value of 0 to 15; set by the kernel

  /// False when the weight's own statement of its sizes is another.
  BUDWOOD_HOST_DEVICE bool open() {
    return stated_block_size == nullptr || *stated_block_size == block_size ||
           (rows * cols <= block_size && rows * cols <= *stated_block_size);
  }
  BUDWOOD_HOST_DEVICE float table_entry(int i) const { return bnb4_value(type, i); }

  BUDWOOD_HOST_DEVICE float scale(int64_t block) const {
    if (absmax != nullptr) return absmax[block];
    return rounded_sum(
        rounded_product(map[absmax_codes[block]], nested_absmax[block / kNestedBlock]), *offset);
  }

  BUDWOOD_HOST_DEVICE float at(int64_t element) const {
    const int byte = codes[element / 2];
    return rounded_product(table[element % 2 == 0 ? byte >> 4 : byte & 15],
                           scale(element / block_size));
  }

  BUDWOOD_HOST_DEVICE void run(int64_t row, int64_t index, float* dst) const {
    const int64_t column = 8 * index, first = row * cols + column;
    if (first % 8 != 0 || column + 8 > cols) {
      for (int i = 0; i < 8; ++i) dst[i] = column + i < cols ? at(first + i) : 0.0f;
      return;
    }
    const uint32_t word = load_u32(codes + first / 2);
    const float s = scale(first / block_size);
    for (int i = 0; i < 4; ++i) {
      const int byte = byte_of(word, i);
      dst[2 * i] = rounded_product(table[byte >> 4], s);
      dst[2 * i + 1] = rounded_product(table[byte & 15], s);
    }
  }
};

/// thresholds [15] by bnb4_threshold.
BUDWOOD_HOST_DEVICE inline int bnb4_code(Bnb4Type type, const float* thresholds, float value) {
  const float v = value > 1.0f ? 1.0f : value < -1.0f ? -1.0f : value;
  int index = 0;
  for (int t = 0; t < 15; ++t) index += thresholds[t] < v ? 1 : 0;
  return bnb4_code_by_size(type, index);
}

/// What is to be encoded: count elements in blocks, the last of which may be short.
struct Bnb4Source {
  Bnb4Type type = Bnb4Type::nf4;
  ConstFloats values;
  int64_t count = 0;
  int64_t block_size = 64;
};

/// Bits of the largest magnitude among the elements of a block that fall to one of `lanes` lanes.
/// An infinity or a NaN is the largest of all.
BUDWOOD_HOST_DEVICE inline uint32_t bnb4_largest_bits(const Bnb4Source& source, int64_t block,
                                                      int lane, int lanes) {
  const int64_t begin = block * source.block_size;
  const int64_t end =
      begin + source.block_size < source.count ? begin + source.block_size : source.count;
  uint32_t most = 0;
  for (int64_t i = begin + lane; i < end; i += lanes) {
    const uint32_t bits = float_bits(source.values.at(i)) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return most;
}

/// The first element of the lane that is not finite, or -1.
BUDWOOD_HOST_DEVICE inline int64_t bnb4_first_not_finite(const Bnb4Source& source, int64_t block,
                                                         int lane, int lanes) {
  const int64_t begin = block * source.block_size;
  for (int64_t i = begin + lane; i < begin + source.block_size && i < source.count; i += lanes)
    if ((float_bits(source.values.at(i)) & 0x7fffffffu) >= 0x7f800000u) return i;
  return -1;
}

/// The lane's bytes of a block whose largest magnitude is known; returns the block's absmax. A full
/// block is multiplied by the inverse, a short one divided.
BUDWOOD_HOST_DEVICE inline float bnb4_encode(const Bnb4Source& source, const float* thresholds,
                                             int64_t block, uint32_t largest_bits, int lane,
                                             int lanes, uint8_t* codes) {
  const int64_t begin = block * source.block_size;
  const bool full = begin + source.block_size <= source.count;
  const int64_t end = full ? begin + source.block_size : source.count;
  const float largest = float_from_bits(largest_bits);
  const float divisor = largest > 1e-38f ? largest : 1e-38f;
  const float inverse = 1.0f / divisor;
  for (int64_t i = begin + 2 * lane; i < end; i += 2 * lanes) {
    int pair[2];
    for (int k = 0; k < 2; ++k) {
      const float value = i + k < end ? source.values.at(i + k) : 0.0f;
      pair[k] = bnb4_code(source.type, thresholds,
                          full ? rounded_product(value, inverse) : value / divisor);
    }
    codes[i / 2] = static_cast<uint8_t>(pair[0] << 4 | pair[1]);
  }
  return full ? largest : divisor;
}

}  // namespace budwood::quant::kernels
