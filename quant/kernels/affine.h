#pragma once

#include <budwood/quant/kernels/half.h>
#include <budwood/quant/kernels/quantize_status.h>

#include <cstdint>

/// Group-affine integers of 4 or 8 bits: W[o, i] = fp32(scale[o, g] * fp32(q[o, i] - zero[o, g])),
/// g = i / group_size, groups along the input axis; the last group of a row may be short.
///
/// Codes are unsigned. At 4 bits a byte holds two, the lower column in its LOW nibble; a row takes
/// affine_row_bytes bytes and shares none with its neighbours (an odd row ends in a zero nibble).
namespace budwood::quant::kernels {

inline int64_t affine_row_bytes(int bits, int64_t cols) {
  return bits == 8 ? cols : (cols + 1) / 2;
}
inline int64_t affine_groups(int64_t cols, int64_t group_size) {
  return (cols + group_size - 1) / group_size;
}

/// n codes, one a byte, to and from the storage above. Packing keeps the lower `bits` of each.
void pack_affine_codes(int bits, const uint8_t* src, int64_t n, uint8_t* codes);
void unpack_affine_codes(int bits, const uint8_t* codes, int64_t n, uint8_t* dst);

enum class AffineMode {
  asymmetric,  ///< from min(0, min w) to max(0, max w); zero = round(-min / scale)
  symmetric,   ///< from -max |w| to max |w|; zero = 2^(bits - 1)
};

struct AffineGrid {
  float scale = 1.0f;
  int32_t zero = 0;
};

/// The grid of a group whose smallest and largest values, 0 among them, are given; its scale is not
/// finite when the range is beyond fp32.
AffineGrid affine_grid(int bits, AffineMode mode, float least, float most);

/// One row, round to nearest (ties to even): scale = range / (2^bits - 1), q = clamp(round(w /
/// scale)
/// + zero). codes [affine_row_bytes], scales and zero_points [affine_groups]. A group of zeros has
/// scale 1. NaN and infinity are faults, and so is a range beyond fp32. Error for bits other than 4
/// and 8 and for a group size below 1.
QuantizeStatus quantize_affine_row(int bits, AffineMode mode, const float* src, int64_t cols,
                                   int64_t group_size, uint8_t* codes, float* scales,
                                   uint8_t* zero_points);

/// A quantised matrix where it lies. Zeros are floats (QA-LoRA merges into them) or integers:
/// one of zeros and zero_points is set.
struct AffineView {
  int bits = 4;
  const uint8_t* codes = nullptr;        ///< [rows, affine_row_bytes]
  const float* scales = nullptr;         ///< [rows, groups]
  const float* zeros = nullptr;          ///< [rows, groups], or null
  const uint8_t* zero_points = nullptr;  ///< [rows, groups], read when zeros is null
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t group_size = 64;
};

/// Columns [begin, begin + n) of one row to dst, n elements of out. Throws Error for what lies
/// outside the matrix.
void dequantize_affine_row(const AffineView& weight, int64_t row, int64_t begin, int64_t n,
                           FloatType out, void* dst);

/// Rows [row, row + rows) by columns [begin, begin + n) as fp32; rows of dst are `stride` floats
/// apart.
void dequantize_affine_tile(const AffineView& weight, int64_t row, int64_t rows, int64_t begin,
                            int64_t n, float* dst, int64_t stride);

/// Rows [begin, end) to dst [end - begin, cols].
void dequantize_affine(const AffineView& weight, int64_t begin, int64_t end, FloatType out,
                       void* dst);

}  // namespace budwood::quant::kernels
