#pragma once

#include <cstdint>

/// The inner loops of cross_entropy.h: one fp32 row of logits each.
namespace budwood::kernels {

struct CrossEntropyPath {
  float (*largest)(const float* x, int64_t n);
  /// The sum of e^(x - shift); where `keep` is set x is replaced by the terms.
  float (*sum_of_exp)(float* x, float shift, int64_t n, bool keep);
  float (*sum)(const float* x, int64_t n);
  /// x = x * scale - shift.
  void (*affine)(float* x, float scale, float shift, int64_t n);
};

extern const CrossEntropyPath kCrossEntropyScalar;
extern const CrossEntropyPath kCrossEntropyAvx2;
extern const CrossEntropyPath kCrossEntropyAvx512;

}  // namespace budwood::kernels
