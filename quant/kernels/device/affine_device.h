#pragma once

#include <budwood/quant/kernels/affine.h>
#include <budwood/quant/kernels/device/floats.h>

/// Group-affine integers (affine.h) and int8 rows (int8.h) for one thread.
namespace budwood::quant::kernels {

/// A weight [rows, cols] where it lies.
template <int kBits>
struct AffineRows {
  static constexpr int kGap = 4;
  static constexpr int kTableSize = 0;

  int64_t rows = 0, cols = 0, groups = 0;
  int64_t group_size = 0;                ///< 0: read from where the weight states it
  const int64_t* stated_size = nullptr;  ///< on the weight's own device
  const uint8_t* codes = nullptr;        ///< [rows, affine_row_bytes]
  const float* scales = nullptr;         ///< [rows, groups]
  const float* zeros = nullptr;          ///< [rows, groups], or null
  const uint8_t* zero_points = nullptr;  ///< [rows, groups], read when zeros is null
  const int32_t* group_of = nullptr;     ///< group of each column, or null: column / group_size

  /// False when the group size does not give the groups.
  BUDWOOD_HOST_DEVICE bool open() {
    if (group_size == 0 && stated_size != nullptr) group_size = *stated_size;
    return group_size > 0 && (group_of != nullptr || groups == (cols - 1) / group_size + 1);
  }

  BUDWOOD_HOST_DEVICE float zero(int64_t entry) const {
    return zeros != nullptr ? zeros[entry] : static_cast<float>(zero_points[entry]);
  }
  BUDWOOD_HOST_DEVICE const uint8_t* row_codes(int64_t row) const {
    return codes + row * (kBits == 8 ? cols : (cols + 1) / 2);
  }

  BUDWOOD_HOST_DEVICE float at(int64_t row, int64_t column) const {
    const uint8_t* bytes = row_codes(row);
    const int q = kBits == 8        ? bytes[column]
                  : column % 2 == 0 ? bytes[column / 2] & 15
                                    : bytes[column / 2] >> 4;
    const int64_t entry =
        row * groups + (group_of != nullptr ? group_of[column] : column / group_size);
    return rounded_product(static_cast<float>(q) - zero(entry), scales[entry]);
  }

  BUDWOOD_HOST_DEVICE void run(int64_t row, int64_t index, float* dst) const {
    const int64_t column = 8 * index;
    if (group_size % 8 != 0 || group_of != nullptr || column + 8 > cols) {
      for (int i = 0; i < 8; ++i) dst[i] = column + i < cols ? at(row, column + i) : 0.0f;
      return;
    }
    const int64_t entry = row * groups + column / group_size;
    const float scale = scales[entry], z = zero(entry);
    const uint8_t* bytes = row_codes(row) + column * kBits / 8;
    const uint32_t low = load_u32(bytes), high = kBits == 8 ? load_u32(bytes + 4) : 0;
    for (int i = 0; i < 8; ++i) {
      const int q =
          kBits == 8 ? byte_of(i < 4 ? low : high, i % 4) : static_cast<int>(low >> (4 * i) & 15u);
      dst[i] = rounded_product(static_cast<float>(q) - z, scale);
    }
  }
};

struct Int8Rows {
  static constexpr int kGap = 4;
  static constexpr int kTableSize = 0;

  int64_t rows = 0, cols = 0;
  const int8_t* codes = nullptr;  ///< [rows, cols]
  const float* scb = nullptr;     ///< [rows]

  BUDWOOD_HOST_DEVICE bool open() { return true; }

  BUDWOOD_HOST_DEVICE void run(int64_t row, int64_t index, float* dst) const {
    const int64_t column = 8 * index;
    const int8_t* from = codes + row * cols + column;
    const float last = float_from_bits(0x3c010204u);  // fp32(1/127)
    for (int i = 0; i < 8; ++i)
      dst[i] = column + i < cols
                   ? rounded_product(rounded_product(static_cast<float>(from[i]), scb[row]), last)
                   : 0.0f;
  }
};

}  // namespace budwood::quant::kernels
