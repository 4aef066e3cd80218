#include <budwood/quant/kernels/affine_paths.h>
#include <budwood/quant/kernels/vectors_avx512.h>

namespace budwood::quant::kernels {
namespace {

__m512 values(__m128i codes, __m512 scale, __m512 zero) {
  return _mm512_mul_ps(_mm512_sub_ps(floats_of_u8(codes), zero), scale);
}

void decode_4(const uint8_t* row, int64_t begin, int64_t n, float scale, float zero, float* dst) {
  const uint8_t* codes = row + begin / 2;
  if ((begin & 1) != 0 && n > 0) {
    *dst++ = (static_cast<float>(*codes++ >> 4) - zero) * scale;
    --n;
  }
  const __m512 scales = _mm512_set1_ps(scale);
  const __m512 zeros = _mm512_set1_ps(zero);
  for (; n >= 32; n -= 32, codes += 16, dst += 32) {
    const __m128i low = low_nibbles(load_bytes(codes));
    const __m128i high = high_nibbles(load_bytes(codes));
    _mm512_storeu_ps(dst, values(_mm_unpacklo_epi8(low, high), scales, zeros));
    _mm512_storeu_ps(dst + 16, values(_mm_unpackhi_epi8(low, high), scales, zeros));
  }
  if (n > 0) {
    const __m128i bytes = _mm_maskz_loadu_epi8(first_lanes((n + 1) / 2), codes);
    const __m128i low = low_nibbles(bytes);
    const __m128i high = high_nibbles(bytes);
    const __mmask16 lanes = first_lanes(n < 16 ? n : 16);
    const __mmask16 more = first_lanes(n < 16 ? 0 : n - 16);
    _mm512_mask_storeu_ps(dst, lanes, values(_mm_unpacklo_epi8(low, high), scales, zeros));
    _mm512_mask_storeu_ps(dst + 16, more, values(_mm_unpackhi_epi8(low, high), scales, zeros));
  }
}

void decode_8(const uint8_t* row, int64_t begin, int64_t n, float scale, float zero, float* dst) {
  const uint8_t* codes = row + begin;
  const __m512 scales = _mm512_set1_ps(scale);
  const __m512 zeros = _mm512_set1_ps(zero);
  for (; n >= 16; n -= 16, codes += 16, dst += 16) {
    _mm512_storeu_ps(dst, values(load_bytes(codes), scales, zeros));
  }
  if (n > 0) {
    const __mmask16 lanes = first_lanes(n);
    const __m128i rest = _mm_maskz_loadu_epi8(lanes, codes);
    _mm512_mask_storeu_ps(dst, lanes, values(rest, scales, zeros));
  }
}

}  // namespace

const AffinePath kAffineAvx512 = {decode_4, decode_8};

}  // namespace budwood::quant::kernels
