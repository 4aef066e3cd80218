#include <budwood/quant/kernels/gguf_blocks_paths.h>
#include <budwood/quant/kernels/vectors_avx2.h>

namespace budwood::quant::kernels {
namespace {

constexpr int32_t kInfinity = 0x7f800000;

float float_of(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// 1/d, or 0 where there is nothing to scale: d = 0, or so small that the inverse overflows.
float inverse(float d) {
  const float id = d == 0.0f ? 0.0f : 1.0f / d;
  int32_t bits;
  std::memcpy(&bits, &id, sizeof bits);
  return (bits & 0x7fffffff) == kInfinity ? 0.0f : id;
}

bool store_fp16(float value, uint8_t* dst) {
  const uint16_t half = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(dst, &half, sizeof half);
  return (half & 0x7c00u) != 0x7c00u;
}

/// 32 codes, trunc(x * id + shift) held to 0..15, as 16 bytes.
void store_nibbles(const __m256* x, float id, float shift, uint8_t* dst) {
  __m256i q[4];
  for (int k = 0; k < 4; ++k) {
    const __m256 scaled = _mm256_mul_ps(x[k], _mm256_set1_ps(id));
    const __m256i code = _mm256_cvttps_epi32(_mm256_add_ps(scaled, _mm256_set1_ps(shift)));
    q[k] = _mm256_max_epi32(_mm256_min_epi32(code, _mm256_set1_epi32(15)), _mm256_setzero_si256());
  }
  const __m128i low = pack_bytes(q[0], q[1], false);
  const __m128i high = pack_bytes(q[2], q[3], false);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm_or_si128(low, _mm_slli_epi16(high, 4)));
}

/// The first element whose value equals v, with its own sign when v is a zero.
float first_equal(const float* src, float v) {
  for (int j = 0; j < 32; j += 8) {
    const __m256 equal = _mm256_cmp_ps(_mm256_loadu_ps(src + j), _mm256_set1_ps(v), _CMP_EQ_OQ);
    const int lanes = _mm256_movemask_ps(equal);
    if (lanes != 0) {
      return src[j + __builtin_ctz(static_cast<unsigned>(lanes))];
    }
  }
  return v;
}

/// The first element of magnitude `bits`; +0 when all are zero, as in the scalar search.
float first_of_magnitude(const float* src, int32_t bits) {
  for (int j = 0; j < 32 && bits != 0; j += 8) {
    const __m256i found =
        _mm256_cmpeq_epi32(magnitude_bits(_mm256_loadu_ps(src + j)), _mm256_set1_epi32(bits));
    const int lanes = _mm256_movemask_ps(_mm256_castsi256_ps(found));
    if (lanes != 0) {
      return src[j + __builtin_ctz(static_cast<unsigned>(lanes))];
    }
  }
  return 0.0f;
}

bool encode_q4_0(const float* src, uint8_t* dst) {
  const int32_t bits = largest_magnitude_bits(src, 32);
  const float d = first_of_magnitude(src, bits) / -8.0f;
  if (bits >= kInfinity || !store_fp16(d, dst)) {
    return false;
  }
  __m256 x[4];
  for (int k = 0; k < 4; ++k) {
    x[k] = _mm256_loadu_ps(src + 8 * k);
  }
  // Where the inverse overflowed, ggml's conversion of infinity gives code 0 (on x86-64).
  const float id = inverse(d);
  store_nibbles(x, id, id == 0.0f && d != 0.0f ? 0.0f : 8.5f, dst + 2);
  return true;
}

bool encode_q4_1(const float* src, uint8_t* dst) {
  if (largest_magnitude_bits(src, 32) >= kInfinity) {
    return false;
  }
  __m256 x[4];
  for (int k = 0; k < 4; ++k) {
    x[k] = _mm256_loadu_ps(src + 8 * k);
  }
  __m256 min8 = _mm256_min_ps(_mm256_min_ps(x[0], x[1]), _mm256_min_ps(x[2], x[3]));
  __m256 max8 = _mm256_max_ps(_mm256_max_ps(x[0], x[1]), _mm256_max_ps(x[2], x[3]));
  __m128 min4 = _mm_min_ps(_mm256_castps256_ps128(min8), _mm256_extractf128_ps(min8, 1));
  __m128 max4 = _mm_max_ps(_mm256_castps256_ps128(max8), _mm256_extractf128_ps(max8, 1));
  min4 = _mm_min_ps(min4, _mm_movehl_ps(min4, min4));
  max4 = _mm_max_ps(max4, _mm_movehl_ps(max4, max4));
  const float least = first_equal(src, _mm_cvtss_f32(_mm_min_ss(min4, _mm_movehdup_ps(min4))));
  const float most = first_equal(src, _mm_cvtss_f32(_mm_max_ss(max4, _mm_movehdup_ps(max4))));
  const float d = (most - least) / 15.0f;
  if (!store_fp16(d, dst) || !store_fp16(least, dst + 2)) {
    return false;
  }
  for (int k = 0; k < 4; ++k) {
    x[k] = _mm256_sub_ps(x[k], _mm256_set1_ps(least));
  }
  store_nibbles(x, inverse(d), 0.5f, dst + 4);
  return true;
}

bool encode_q8_0(const float* src, uint8_t* dst) {
  const int32_t bits = largest_magnitude_bits(src, 32);
  const float d = float_of(bits) / 127.0f;
  if (bits >= kInfinity || !store_fp16(d, dst)) {
    return false;
  }
  const __m256 id = _mm256_set1_ps(inverse(d));
  const __m256 half = _mm256_set1_ps(0.5f);
  const __m256 minus_half = _mm256_set1_ps(-0.5f);
  __m256i q[4];
  for (int k = 0; k < 4; ++k) {
    // Half away from zero; the difference to the truncated value is exact. True is -1.
    const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(src + 8 * k), id);
    const __m256i whole = _mm256_cvttps_epi32(scaled);
    const __m256 rest = _mm256_sub_ps(scaled, _mm256_cvtepi32_ps(whole));
    const __m256i up = _mm256_castps_si256(_mm256_cmp_ps(rest, half, _CMP_GE_OQ));
    const __m256i down = _mm256_castps_si256(_mm256_cmp_ps(rest, minus_half, _CMP_LE_OQ));
    q[k] = _mm256_add_epi32(_mm256_sub_epi32(whole, up), down);
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + 2), pack_bytes(q[0], q[1], true));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + 18), pack_bytes(q[2], q[3], true));
  return true;
}

}  // namespace

const GgufEncoders kGgufEncodeAvx2 = {encode_q4_0, encode_q4_1, encode_q8_0};

}  // namespace budwood::quant::kernels
