#pragma once

#include <budwood/peft/kernels/adam8bit.h>

/// The inner loops of adam8bit.h.
namespace budwood::kernels {

struct Adam8bitPath {
  /// m, v and p of one block, given g; then the largest magnitudes of m and v.
  void (*update)(const Adam8bitStep& step, int64_t n, float* p, const float* g, float* m, float* v,
                 float* most_m, float* most_v);
};

extern const Adam8bitPath kAdam8bitScalar;
extern const Adam8bitPath kAdam8bitAvx2;
extern const Adam8bitPath kAdam8bitAvx512;

}  // namespace budwood::kernels
