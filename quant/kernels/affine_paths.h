#pragma once

#include <cstdint>

/// The versions of affine.h's inner loops, one per instruction set.
namespace budwood::quant::kernels {

struct AffinePath {
  /// Columns [begin, begin + n) of a row, all of one group: (q - zero) * scale.
  using Decode = void (*)(const uint8_t* row, int64_t begin, int64_t n, float scale, float zero,
                          float* dst);
  Decode decode_4;
  Decode decode_8;
};

extern const AffinePath kAffineScalar;
extern const AffinePath kAffineAvx2;
extern const AffinePath kAffineAvx512;

struct AffineEncoder {
  /// Smallest and largest of n values and 0; false when one is a NaN or an infinity.
  bool (*range)(const float* src, int64_t n, float* least, float* most);
  /// clamp(round-half-even(x / scale) + zero, 0, top), one code a byte.
  void (*encode)(const float* src, int64_t n, float scale, int32_t zero, int32_t top, uint8_t* dst);
};

extern const AffineEncoder kAffineEncodeScalar;
extern const AffineEncoder kAffineEncodeAvx2;

}  // namespace budwood::quant::kernels
