#pragma once

#include <budwood/peft/kernels/rows.h>

/// The inner loops of rows.h: one fp32 row each.
namespace budwood::kernels {

struct RowsPath {
  /// The sum of a[i] b[i].
  float (*dot)(const float* a, const float* b, int64_t n);
  float (*sum)(const float* a, int64_t n);
  /// The sum of (a[i] - mean)^2.
  float (*square_deviation)(const float* a, float mean, int64_t n);
  /// y = (a - shift) * scale.
  void (*affine)(const float* a, float shift, float scale, int64_t n, float* y);
  /// y = a ∘ w (+ b).
  void (*times)(const float* a, const float* w, const float* b, int64_t n, float* y);
  /// y = a * s - b * t - u.
  void (*combine)(const float* a, float s, const float* b, float t, float u, int64_t n, float* y);
  /// to += a.
  void (*add)(const float* a, int64_t n, float* to);
  void (*gated)(Gate gate, const float* g, const float* u, int64_t n, float* y);
  void (*gated_backward)(Gate gate, const float* grad, const float* g, const float* u, int64_t n,
                         float* dg, float* du);
  /// One head: y = turned x; sign 1 or -1.
  void (*rotate)(const float* x, const float* cos, const float* sin, float sign, int64_t half,
                 float* y);
};

extern const RowsPath kRowsScalar;
extern const RowsPath kRowsAvx2;
extern const RowsPath kRowsAvx512;

}  // namespace budwood::kernels
