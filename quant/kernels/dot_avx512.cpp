#include <immintrin.h>

#include <budwood/quant/kernels/dot_paths.h>

namespace budwood::quant::kernels {
namespace {

void accumulate(const float* w, const float* x, int64_t n, float* lanes) {
  __m512 sums[4];
  for (int j = 0; j < 4; ++j) {
    sums[j] = _mm512_loadu_ps(lanes + 16 * j);
  }
  for (int64_t i = 0; i < n; i += kDotLanes) {
    for (int j = 0; j < 4; ++j) {
      const __m512 product =
          _mm512_mul_ps(_mm512_loadu_ps(w + i + 16 * j), _mm512_loadu_ps(x + i + 16 * j));
      sums[j] = _mm512_add_ps(sums[j], product);
    }
  }
  for (int j = 0; j < 4; ++j) {
    _mm512_storeu_ps(lanes + 16 * j, sums[j]);
  }
}

}  // namespace

const DotPath kDotAvx512 = {accumulate};

}  // namespace budwood::quant::kernels
