#include <budwood/quant/kernels/half_paths.h>
#include <budwood/quant/kernels/vectors_avx2.h>

namespace budwood::quant::kernels {
namespace {

/// Runs `step` on 8 elements at a time; the rest goes through a padded copy.
template <class From, class To, class Step>
void in_eights(const From* src, To* dst, int64_t n, Step step) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    step(src + i, dst + i);
  }
  if (i < n) {
    const size_t rest = static_cast<size_t>(n - i);
    From from[8] = {};
    To to[8];
    std::memcpy(from, src + i, rest * sizeof(From));
    step(from, to);
    std::memcpy(dst + i, to, rest * sizeof(To));
  }
}

void fp16_to_fp32(const uint16_t* src, float* dst, int64_t n) {
  in_eights(src, dst, n, [](const uint16_t* from, float* to) {
    _mm256_storeu_ps(to, _mm256_cvtph_ps(load_bytes(from)));
  });
}

void bf16_to_fp32(const uint16_t* src, float* dst, int64_t n) {
  in_eights(src, dst, n, [](const uint16_t* from, float* to) {
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bytes(from)), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
  });
}

void fp32_to_fp16(const float* src, uint16_t* dst, int64_t n) {
  in_eights(src, dst, n, [](const float* from, uint16_t* to) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
  });
}

void fp32_to_bf16(const float* src, uint16_t* dst, int64_t n) {
  in_eights(src, dst, n, [](const float* from, uint16_t* to) {
    const __m256 value = _mm256_loadu_ps(from);
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i upper = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i half = _mm256_blendv_epi8(rounded, quiet, nan);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(words));
  });
}

}  // namespace

const HalfPath kHalfAvx2 = {fp16_to_fp32, bf16_to_fp32, fp32_to_fp16, fp32_to_bf16};

}  // namespace budwood::quant::kernels
