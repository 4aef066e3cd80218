#include <budwood/quant/kernels/gguf_blocks_paths.h>
#include <budwood/quant/kernels/vectors_avx2.h>

namespace budwood::quant::kernels {
namespace {

/// 16 signed codes times scale.
void store_scaled(float* dst, __m128i codes, __m256 scale) {
  _mm256_storeu_ps(dst, _mm256_mul_ps(floats_of_i8(codes), scale));
  _mm256_storeu_ps(dst + 8, _mm256_mul_ps(floats_of_i8(upper_8(codes)), scale));
}

/// 16 unsigned codes times scale, plus shift.
void store_shifted(float* dst, __m128i codes, __m256 scale, __m256 shift) {
  const __m256 first = _mm256_mul_ps(floats_of_u8(codes), scale);
  const __m256 second = _mm256_mul_ps(floats_of_u8(upper_8(codes)), scale);
  _mm256_storeu_ps(dst, _mm256_add_ps(first, shift));
  _mm256_storeu_ps(dst + 8, _mm256_add_ps(second, shift));
}

/// 32 bits as 32 bytes of 16 or 0.
__m256i fifth_bits(const uint8_t* src) {
  int32_t bits;
  std::memcpy(&bits, src, sizeof bits);
  const __m256i byte_of = _mm256_setr_epi64x(0x0000000000000000, 0x0101010101010101,
                                             0x0202020202020202, 0x0303030303030303);
  const __m256i bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte_of);
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit_of), bit_of);
  return _mm256_and_si256(set, _mm256_set1_epi8(16));
}

void decode_q4_0(const uint8_t* src, float* dst, int64_t blocks) {
  const __m128i middle = _mm_set1_epi8(8);
  for (; blocks > 0; --blocks, src += 18, dst += 32) {
    const __m256 d = _mm256_set1_ps(load_fp16(src));
    const __m128i qs = load_bytes(src + 2);
    store_scaled(dst, _mm_sub_epi8(low_nibbles(qs), middle), d);
    store_scaled(dst + 16, _mm_sub_epi8(high_nibbles(qs), middle), d);
  }
}

void decode_q4_1(const uint8_t* src, float* dst, int64_t blocks) {
  for (; blocks > 0; --blocks, src += 20, dst += 32) {
    const __m256 d = _mm256_set1_ps(load_fp16(src));
    const __m256 m = _mm256_set1_ps(load_fp16(src + 2));
    const __m128i qs = load_bytes(src + 4);
    store_shifted(dst, low_nibbles(qs), d, m);
    store_shifted(dst + 16, high_nibbles(qs), d, m);
  }
}

void decode_q5_0(const uint8_t* src, float* dst, int64_t blocks) {
  const __m128i middle = _mm_set1_epi8(16);
  for (; blocks > 0; --blocks, src += 22, dst += 32) {
    const __m256 d = _mm256_set1_ps(load_fp16(src));
    const __m256i fifth = fifth_bits(src + 2);
    const __m128i qs = load_bytes(src + 6);
    const __m128i low = _mm_or_si128(low_nibbles(qs), _mm256_castsi256_si128(fifth));
    const __m128i high = _mm_or_si128(high_nibbles(qs), _mm256_extracti128_si256(fifth, 1));
    store_scaled(dst, _mm_sub_epi8(low, middle), d);
    store_scaled(dst + 16, _mm_sub_epi8(high, middle), d);
  }
}

void decode_q5_1(const uint8_t* src, float* dst, int64_t blocks) {
  for (; blocks > 0; --blocks, src += 24, dst += 32) {
    const __m256 d = _mm256_set1_ps(load_fp16(src));
    const __m256 m = _mm256_set1_ps(load_fp16(src + 2));
    const __m256i fifth = fifth_bits(src + 4);
    const __m128i qs = load_bytes(src + 8);
    const __m128i low = _mm_or_si128(low_nibbles(qs), _mm256_castsi256_si128(fifth));
    const __m128i high = _mm_or_si128(high_nibbles(qs), _mm256_extracti128_si256(fifth, 1));
    store_shifted(dst, low, d, m);
    store_shifted(dst + 16, high, d, m);
  }
}

void decode_q8_0(const uint8_t* src, float* dst, int64_t blocks) {
  for (; blocks > 0; --blocks, src += 34, dst += 32) {
    const __m256 d = _mm256_set1_ps(load_fp16(src));
    store_scaled(dst, load_bytes(src + 2), d);
    store_scaled(dst + 16, load_bytes(src + 18), d);
  }
}

/// The eight scales and negated minimums of a Q4_K or Q5_K block.
void sub_blocks(const uint8_t* block, float* scales, float* shifts) {
  uint32_t s[3];
  std::memcpy(s, block + 4, sizeof s);
  const uint64_t sc_low = s[0] & 0x3f3f3f3fu;
  const uint64_t mn_low = s[1] & 0x3f3f3f3fu;
  const uint64_t sc_high = (s[2] & 0x0f0f0f0fu) | ((s[0] >> 2) & 0x30303030u);
  const uint64_t mn_high = ((s[2] >> 4) & 0x0f0f0f0fu) | ((s[1] >> 2) & 0x30303030u);
  const __m128i sc = _mm_cvtsi64_si128(static_cast<int64_t>(sc_low | sc_high << 32));
  const __m128i mn = _mm_cvtsi64_si128(static_cast<int64_t>(mn_low | mn_high << 32));
  const __m256 d = _mm256_set1_ps(load_fp16(block));
  const __m256 dmin = _mm256_set1_ps(load_fp16(block + 2));
  _mm256_storeu_ps(scales, _mm256_mul_ps(d, floats_of_u8(sc)));
  const __m256 minimum = _mm256_mul_ps(dmin, floats_of_u8(mn));
  _mm256_storeu_ps(shifts, _mm256_xor_ps(minimum, _mm256_set1_ps(-0.0f)));
}

void decode_q4_k(const uint8_t* src, float* dst, int64_t blocks) {
  float scales[8];
  float shifts[8];
  for (; blocks > 0; --blocks, src += 144) {
    sub_blocks(src, scales, shifts);
    for (int k = 0; k < 4; ++k, dst += 64) {
      const __m256 d0 = _mm256_set1_ps(scales[2 * k]);
      const __m256 d1 = _mm256_set1_ps(scales[2 * k + 1]);
      const __m256 m0 = _mm256_set1_ps(shifts[2 * k]);
      const __m256 m1 = _mm256_set1_ps(shifts[2 * k + 1]);
      for (int l = 0; l < 32; l += 16) {
        const __m128i qs = load_bytes(src + 16 + 32 * k + l);
        store_shifted(dst + l, low_nibbles(qs), d0, m0);
        store_shifted(dst + 32 + l, high_nibbles(qs), d1, m1);
      }
    }
  }
}

void decode_q5_k(const uint8_t* src, float* dst, int64_t blocks) {
  float scales[8];
  float shifts[8];
  const __m128i sixteen = _mm_set1_epi8(16);
  for (; blocks > 0; --blocks, src += 176) {
    sub_blocks(src, scales, shifts);
    for (int k = 0; k < 4; ++k, dst += 64) {
      const __m256 d0 = _mm256_set1_ps(scales[2 * k]);
      const __m256 d1 = _mm256_set1_ps(scales[2 * k + 1]);
      const __m256 m0 = _mm256_set1_ps(shifts[2 * k]);
      const __m256 m1 = _mm256_set1_ps(shifts[2 * k + 1]);
      for (int l = 0; l < 32; l += 16) {
        const __m128i qs = load_bytes(src + 48 + 32 * k + l);
        // Bits 2k and 2k + 1 come to places 0 and 1; what else the shift brings along is masked.
        const __m128i qh = _mm_srl_epi16(load_bytes(src + 16 + l), _mm_cvtsi32_si128(2 * k));
        const __m128i fifth0 = _mm_and_si128(_mm_slli_epi16(qh, 4), sixteen);
        const __m128i fifth1 = _mm_and_si128(_mm_slli_epi16(qh, 3), sixteen);
        store_shifted(dst + l, _mm_or_si128(low_nibbles(qs), fifth0), d0, m0);
        store_shifted(dst + 32 + l, _mm_or_si128(high_nibbles(qs), fifth1), d1, m1);
      }
    }
  }
}

void decode_q6_k(const uint8_t* src, float* dst, int64_t blocks) {
  const __m128i upper_two = _mm_set1_epi8(0x30);
  const __m128i middle = _mm_set1_epi8(32);
  float scales[16];
  for (; blocks > 0; --blocks, src += 210) {
    const __m256 d = _mm256_set1_ps(load_fp16(src + 208));
    const __m128i sc = load_bytes(src + 192);
    _mm256_storeu_ps(scales, _mm256_mul_ps(d, floats_of_i8(sc)));
    _mm256_storeu_ps(scales + 8, _mm256_mul_ps(d, floats_of_i8(upper_8(sc))));
    for (int half = 0; half < 2; ++half, dst += 128) {
      const float* scale = scales + 8 * half;
      for (int i = 0; i < 2; ++i) {
        const __m128i qh = load_bytes(src + 128 + 32 * half + 16 * i);
        const __m128i ql0 = load_bytes(src + 64 * half + 16 * i);
        const __m128i ql1 = load_bytes(src + 64 * half + 32 + 16 * i);
        const __m128i h0 = _mm_and_si128(_mm_slli_epi16(qh, 4), upper_two);
        const __m128i h1 = _mm_and_si128(_mm_slli_epi16(qh, 2), upper_two);
        const __m128i h2 = _mm_and_si128(qh, upper_two);
        const __m128i h3 = _mm_and_si128(_mm_srli_epi16(qh, 2), upper_two);
        const __m128i q0 = _mm_sub_epi8(_mm_or_si128(low_nibbles(ql0), h0), middle);
        const __m128i q1 = _mm_sub_epi8(_mm_or_si128(low_nibbles(ql1), h1), middle);
        const __m128i q2 = _mm_sub_epi8(_mm_or_si128(high_nibbles(ql0), h2), middle);
        const __m128i q3 = _mm_sub_epi8(_mm_or_si128(high_nibbles(ql1), h3), middle);
        float* out = dst + 16 * i;
        store_scaled(out, q0, _mm256_set1_ps(scale[i]));
        store_scaled(out + 32, q1, _mm256_set1_ps(scale[i + 2]));
        store_scaled(out + 64, q2, _mm256_set1_ps(scale[i + 4]));
        store_scaled(out + 96, q3, _mm256_set1_ps(scale[i + 6]));
      }
    }
  }
}

}  // namespace

const GgufPath kGgufAvx2 = {decode_q4_0, decode_q4_1, decode_q5_0, decode_q5_1,
                            decode_q8_0, decode_q4_k, decode_q5_k, decode_q6_k};

}  // namespace budwood::quant::kernels
