#pragma once

#include <cstdint>

/// The versions of int8.h's inner loops, one per instruction set.
namespace budwood::quant::kernels {

struct Int8Path {
  /// max |x| as the bits of a float; 0x7f800000 and above mean an infinity or a NaN.
  int32_t (*largest_magnitude)(const float* src, int64_t n);
  /// round-half-even(x * scale); |x * scale| is at most 127.
  void (*encode)(const float* src, float scale, int64_t n, int8_t* codes);
  /// fp32(fp32(q * scb) * last).
  void (*decode)(const int8_t* codes, float scb, float last, int64_t n, float* dst);
};

extern const Int8Path kInt8Scalar;
extern const Int8Path kInt8Avx2;
extern const Int8Path kInt8Avx512;

}  // namespace budwood::quant::kernels
