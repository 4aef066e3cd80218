#include <immintrin.h>

#include <budwood/quant/kernels/dot_paths.h>

namespace budwood::quant::kernels {
namespace {

void accumulate(const float* w, const float* x, int64_t n, float* lanes) {
  __m256 sums[8];
  for (int j = 0; j < 8; ++j) {
    sums[j] = _mm256_loadu_ps(lanes + 8 * j);
  }
  for (int64_t i = 0; i < n; i += kDotLanes) {
    for (int j = 0; j < 8; ++j) {
      const __m256 product =
          _mm256_mul_ps(_mm256_loadu_ps(w + i + 8 * j), _mm256_loadu_ps(x + i + 8 * j));
      sums[j] = _mm256_add_ps(sums[j], product);
    }
  }
  for (int j = 0; j < 8; ++j) {
    _mm256_storeu_ps(lanes + 8 * j, sums[j]);
  }
}

}  // namespace

const DotPath kDotAvx2 = {accumulate};

}  // namespace budwood::quant::kernels
