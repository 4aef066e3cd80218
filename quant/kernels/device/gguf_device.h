#pragma once

#include <budwood/quant/kernels/device/floats.h>
#include <budwood/quant/kernels/gguf_blocks.h>

/// GGUF blocks (gguf_blocks.h) for one thread.
namespace budwood::quant::kernels {

constexpr int gguf_block_bytes(GgmlType type) {
  switch (type) {
    case GgmlType::q4_0:
      return 18;
    case GgmlType::q4_1:
      return 20;
    case GgmlType::q5_0:
      return 22;
    case GgmlType::q5_1:
      return 24;
    case GgmlType::q8_0:
      return 34;
    case GgmlType::q4_k:
      return 144;
    case GgmlType::q5_k:
      return 176;
    default:
      return 210;
  }
}

constexpr int gguf_block_elements(GgmlType type) {
  return type == GgmlType::q4_k || type == GgmlType::q5_k || type == GgmlType::q6_k ? 256 : 32;
}

/// A byte holds one nibble of two elements that are this far apart.
constexpr int gguf_gap(GgmlType type) {
  switch (type) {
    case GgmlType::q8_0:
      return 4;
    case GgmlType::q4_k:
    case GgmlType::q5_k:
      return 32;
    case GgmlType::q6_k:
      return 64;
    default:
      return 16;
  }
}

struct GgufScale {
  float scale, minimum;
};

/// Scale and minimum of sub-block j (0..7) of Q4_K and Q5_K.
BUDWOOD_HOST_DEVICE inline GgufScale gguf_sub_block(const uint8_t* block, int j) {
  const uint8_t* s = block + 4;
  const int sc = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
  const int mn = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
  const auto fp16_at = [block](int at) {
    return widened_fp16(static_cast<uint16_t>(load_u16(block + at)));
  };
  return {rounded_product(fp16_at(0), static_cast<float>(sc)),
          rounded_product(fp16_at(2), static_cast<float>(mn))};
}

/// A weight [rows, cols] where it lies; cols is a multiple of the block.
template <GgmlType kType>
struct GgufRows {
  static constexpr int kGap = gguf_gap(kType);
  static constexpr int kTableSize = 0;
  static constexpr int kElements = gguf_block_elements(kType);
  static constexpr int kBytes = gguf_block_bytes(kType);

  int64_t rows = 0, cols = 0;
  const uint8_t* blocks = nullptr;

  BUDWOOD_HOST_DEVICE bool open() { return cols % kElements == 0; }

  BUDWOOD_HOST_DEVICE void run(int64_t row, int64_t index, float* dst) const {
    const int64_t number = row * (cols / kElements) + index / (kElements / 8);
    const uint8_t* block = blocks + number * kBytes;
    const int r = static_cast<int>(index % (kElements / 8));
    if constexpr (kType == GgmlType::q8_0)
      bytes(block, r, dst);
    else if constexpr (kType == GgmlType::q4_k || kType == GgmlType::q5_k)
      sub_blocks(block, r, dst);
    else if constexpr (kType == GgmlType::q6_k)
      six_bits(block, r, dst);
    else
      nibbles(block, r, dst);
  }

 private:
  BUDWOOD_HOST_DEVICE static float fp16_at(const uint8_t* p) {
    return widened_fp16(static_cast<uint16_t>(load_u16(p)));
  }

  BUDWOOD_HOST_DEVICE static void bytes(const uint8_t* block, int r, float* dst) {
    const float d = fp16_at(block);
    const uint32_t words[2] = {load_u32(block + 2 + 8 * r), load_u32(block + 6 + 8 * r)};
    for (int i = 0; i < 8; ++i) {
      const int8_t q = static_cast<int8_t>(byte_of(words[i / 4], i % 4));
      dst[i] = rounded_product(static_cast<float>(q), d);
    }
  }

  /// Q4_0, Q4_1, Q5_0 and Q5_1.
  BUDWOOD_HOST_DEVICE static void nibbles(const uint8_t* block, int r, float* dst) {
    constexpr bool kMinimum = kType == GgmlType::q4_1 || kType == GgmlType::q5_1;
    constexpr bool kFive = kType == GgmlType::q5_0 || kType == GgmlType::q5_1;
    constexpr int kHigh = kMinimum ? 4 : 2;
    const float d = fp16_at(block), m = kMinimum ? fp16_at(block + 2) : 0.0f;
    const uint32_t qs = load_u32(block + kHigh + (kFive ? 4 : 0) + 4 * r);
    const uint32_t qh = kFive ? load_u32(block + kHigh) >> (4 * r) : 0;
    for (int i = 0; i < 8; ++i) {
      int q = byte_of(qs, i % 4) >> (i / 4 * 4) & 15;
      if (kFive) q |= static_cast<int>(qh >> (i % 4 + i / 4 * 16) & 1u) << 4;
      if (kMinimum)
        dst[i] = rounded_sum(rounded_product(static_cast<float>(q), d), m);
      else
        dst[i] = rounded_product(static_cast<float>(q - (kFive ? 16 : 8)), d);
    }
  }

  /// Q4_K and Q5_K.
  BUDWOOD_HOST_DEVICE static void sub_blocks(const uint8_t* block, int r, float* dst) {
    constexpr bool kFive = kType == GgmlType::q5_k;
    const int k = r / 8, w = r % 8;
    const uint32_t qs = load_u32(block + (kFive ? 48 : 16) + 32 * k + 4 * w);
    const uint32_t qh = kFive ? load_u32(block + 16 + 4 * w) : 0;
    for (int half = 0; half < 2; ++half) {
      const GgufScale s = gguf_sub_block(block, 2 * k + half);
      for (int i = 0; i < 4; ++i) {
        int q = byte_of(qs, i) >> (4 * half) & 15;
        if (kFive) q |= (byte_of(qh, i) >> (2 * k + half) & 1) << 4;
        dst[4 * half + i] =
            rounded_sum(rounded_product(s.scale, static_cast<float>(q)), -s.minimum);
      }
    }
  }

  BUDWOOD_HOST_DEVICE static void six_bits(const uint8_t* block, int r, float* dst) {
    const float d = fp16_at(block + 208);
    const int half = r / 16, w = r % 16, l = 4 * (w % 8);
    const uint32_t ql = load_u32(block + 64 * half + 4 * w);
    const uint32_t qh = load_u32(block + 128 + 32 * half + l);
    for (int part = 0; part < 2; ++part) {
      const int quarter = w / 8 + 2 * part;
      const auto sc = static_cast<int8_t>(block[192 + 8 * half + 2 * quarter + l / 16]);
      const float scale = rounded_product(d, static_cast<float>(sc));
      for (int i = 0; i < 4; ++i) {
        const int q = (byte_of(ql, i) >> (4 * part) & 15) | (byte_of(qh, i) >> (2 * quarter) & 3)
                                                                << 4;
        dst[4 * part + i] = rounded_product(scale, static_cast<float>(q - 32));
      }
    }
  }
};

}  // namespace budwood::quant::kernels
