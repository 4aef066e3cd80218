#include <budwood/quant/kernels/half_paths.h>
#include <budwood/quant/kernels/vectors_avx512.h>

namespace budwood::quant::kernels {
namespace {

/// Runs `step` on 16 elements at a time, the last time on the lanes that are left.
template <class From, class To, class Step>
void in_sixteens(const From* src, To* dst, int64_t n, Step step) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    step(src + i, dst + i, first_lanes(16));
  }
  if (i < n) {
    step(src + i, dst + i, first_lanes(n - i));
  }
}

void fp16_to_fp32(const uint16_t* src, float* dst, int64_t n) {
  in_sixteens(src, dst, n, [](const uint16_t* from, float* to, __mmask16 lanes) {
    _mm512_mask_storeu_ps(to, lanes, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, from)));
  });
}

void bf16_to_fp32(const uint16_t* src, float* dst, int64_t n) {
  in_sixteens(src, dst, n, [](const uint16_t* from, float* to, __mmask16 lanes) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
    _mm512_mask_storeu_epi32(to, lanes, _mm512_slli_epi32(wide, 16));
  });
}

void fp32_to_fp16(const float* src, uint16_t* dst, int64_t n) {
  in_sixteens(src, dst, n, [](const float* from, uint16_t* to, __mmask16 lanes) {
    const __m512 value = _mm512_maskz_loadu_ps(lanes, from);
    _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  });
}

// Not vcvtneps2bf16: that instruction flushes subnormals.
void fp32_to_bf16(const float* src, uint16_t* dst, int64_t n) {
  in_sixteens(src, dst, n, [](const float* from, uint16_t* to, __mmask16 lanes) {
    const __m512 value = _mm512_maskz_loadu_ps(lanes, from);
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i upper = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i half = _mm512_mask_or_epi32(rounded, nan, upper, _mm512_set1_epi32(0x40));
    _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtepi32_epi16(half));
  });
}

}  // namespace

const HalfPath kHalfAvx512 = {fp16_to_fp32, bf16_to_fp32, fp32_to_fp16, fp32_to_bf16};

}  // namespace budwood::quant::kernels
