#include <budwood/quant/kernels/affine_paths.h>
#include <budwood/quant/kernels/vectors_avx512.h>

namespace budwood::quant::kernels {
namespace {

void store(__m128i codes, __m512 scale, __m512 zero, __mmask16 lanes, float* dst) {
  const __m512 values = _mm512_mul_ps(_mm512_sub_ps(floats_of_u8(codes), zero), scale);
  _mm512_mask_storeu_ps(dst, lanes, values);
}

void decode_4(const uint8_t* row, int64_t begin, int64_t n, float scale, float zero, float* dst) {
  const uint8_t* codes = row + begin / 2;
  if ((begin & 1) != 0 && n > 0) {
    *dst++ = (static_cast<float>(*codes++ >> 4) - zero) * scale;
    --n;
  }
  const __m512 scales = _mm512_set1_ps(scale);
  const __m512 zeros = _mm512_set1_ps(zero);
  for (; n > 0; n -= 32, codes += 16, dst += 32) {
    const int64_t here = n < 32 ? n : 32;
    const __m128i bytes = _mm_maskz_loadu_epi8(first_lanes((here + 1) / 2), codes);
    const __m128i low = low_nibbles(bytes);
    const __m128i high = high_nibbles(bytes);
    const __mmask16 lanes = first_lanes(here < 16 ? here : 16);
    const __mmask16 more = first_lanes(here < 16 ? 0 : here - 16);
    store(_mm_unpacklo_epi8(low, high), scales, zeros, lanes, dst);
    store(_mm_unpackhi_epi8(low, high), scales, zeros, more, dst + 16);
  }
}

void decode_8(const uint8_t* row, int64_t begin, int64_t n, float scale, float zero, float* dst) {
  const uint8_t* codes = row + begin;
  const __m512 scales = _mm512_set1_ps(scale);
  const __m512 zeros = _mm512_set1_ps(zero);
  for (; n > 0; n -= 16, codes += 16, dst += 16) {
    const __mmask16 lanes = first_lanes(n < 16 ? n : 16);
    store(_mm_maskz_loadu_epi8(lanes, codes), scales, zeros, lanes, dst);
  }
}

}  // namespace

const AffinePath kAffineAvx512 = {decode_4, decode_8};

}  // namespace budwood::quant::kernels
