#include <budwood/quant/kernels/int8_paths.h>
#include <budwood/quant/kernels/vectors_avx512.h>

namespace budwood::quant::kernels {
namespace {

void encode(const float* src, float scale, int64_t n, int8_t* codes) {
  const __m512 scales = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i < 16 ? n - i : 16);
    const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, src + i), scales);
    _mm_mask_storeu_epi8(codes + i, lanes, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(scaled)));
  }
}

void decode(const int8_t* codes, float scb, float last, int64_t n, float* dst) {
  const __m512 scbs = _mm512_set1_ps(scb);
  const __m512 lasts = _mm512_set1_ps(last);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i < 16 ? n - i : 16);
    const __m512 scaled = _mm512_mul_ps(floats_of_i8(_mm_maskz_loadu_epi8(lanes, codes + i)), scbs);
    _mm512_mask_storeu_ps(dst + i, lanes, _mm512_mul_ps(scaled, lasts));
  }
}

}  // namespace

const Int8Path kInt8Avx512 = {largest_magnitude_bits, encode, decode};

}  // namespace budwood::quant::kernels
