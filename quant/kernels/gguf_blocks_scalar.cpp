#include <budwood/quant/kernels/gguf_blocks_paths.h>
#include <budwood/quant/kernels/half.h>

namespace budwood::quant::kernels {
namespace {

float load_fp16(const uint8_t* src) {
  return fp16_to_fp32(static_cast<uint16_t>(src[0] | (src[1] << 8)));
}

uint32_t load_u32(const uint8_t* src) {
  return static_cast<uint32_t>(src[0]) | static_cast<uint32_t>(src[1]) << 8 |
         static_cast<uint32_t>(src[2]) << 16 | static_cast<uint32_t>(src[3]) << 24;
}

void decode_q4_0(const uint8_t* src, float* dst, int64_t blocks) {
  for (; blocks > 0; --blocks, src += 18, dst += 32) {
    const float d = load_fp16(src);
    const uint8_t* qs = src + 2;
    for (int j = 0; j < 16; ++j) {
      dst[j] = static_cast<float>((qs[j] & 15) - 8) * d;
      dst[j + 16] = static_cast<float>((qs[j] >> 4) - 8) * d;
    }
  }
}

void decode_q4_1(const uint8_t* src, float* dst, int64_t blocks) {
  for (; blocks > 0; --blocks, src += 20, dst += 32) {
    const float d = load_fp16(src);
    const float m = load_fp16(src + 2);
    const uint8_t* qs = src + 4;
    for (int j = 0; j < 16; ++j) {
      dst[j] = static_cast<float>(qs[j] & 15) * d + m;
      dst[j + 16] = static_cast<float>(qs[j] >> 4) * d + m;
    }
  }
}

void decode_q5_0(const uint8_t* src, float* dst, int64_t blocks) {
  for (; blocks > 0; --blocks, src += 22, dst += 32) {
    const float d = load_fp16(src);
    const uint32_t qh = load_u32(src + 2);
    const uint8_t* qs = src + 6;
    for (int j = 0; j < 16; ++j) {
      const int low = (qs[j] & 15) | static_cast<int>((qh >> j & 1u) << 4);
      const int high = (qs[j] >> 4) | static_cast<int>((qh >> (j + 16) & 1u) << 4);
      dst[j] = static_cast<float>(low - 16) * d;
      dst[j + 16] = static_cast<float>(high - 16) * d;
    }
  }
}

void decode_q5_1(const uint8_t* src, float* dst, int64_t blocks) {
  for (; blocks > 0; --blocks, src += 24, dst += 32) {
    const float d = load_fp16(src);
    const float m = load_fp16(src + 2);
    const uint32_t qh = load_u32(src + 4);
    const uint8_t* qs = src + 8;
    for (int j = 0; j < 16; ++j) {
      const int low = (qs[j] & 15) | static_cast<int>((qh >> j & 1u) << 4);
      const int high = (qs[j] >> 4) | static_cast<int>((qh >> (j + 16) & 1u) << 4);
      dst[j] = static_cast<float>(low) * d + m;
      dst[j + 16] = static_cast<float>(high) * d + m;
    }
  }
}

void decode_q8_0(const uint8_t* src, float* dst, int64_t blocks) {
  for (; blocks > 0; --blocks, src += 34, dst += 32) {
    const float d = load_fp16(src);
    for (int j = 0; j < 32; ++j) {
      dst[j] = static_cast<float>(static_cast<int8_t>(src[2 + j])) * d;
    }
  }
}

struct SubBlock {
  float scale;
  float minimum;
};

/// Scale and minimum of sub-block j (0..7) of Q4_K and Q5_K: d and dmin at 0 and 2, 6-bit pairs
/// at 4.
SubBlock sub_block(const uint8_t* block, int j) {
  const uint8_t* s = block + 4;
  int sc = 0;
  int mn = 0;
  if (j < 4) {
    sc = s[j] & 63;
    mn = s[j + 4] & 63;
  } else {
    sc = (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4);
    mn = (s[j + 4] >> 4) | ((s[j] >> 6) << 4);
  }
  return {load_fp16(block) * static_cast<float>(sc), load_fp16(block + 2) * static_cast<float>(mn)};
}

void decode_q4_k(const uint8_t* src, float* dst, int64_t blocks) {
  for (; blocks > 0; --blocks, src += 144) {
    for (int k = 0; k < 4; ++k, dst += 64) {
      const uint8_t* qs = src + 16 + 32 * k;
      const SubBlock low = sub_block(src, 2 * k);
      const SubBlock high = sub_block(src, 2 * k + 1);
      for (int l = 0; l < 32; ++l) {
        dst[l] = low.scale * static_cast<float>(qs[l] & 15) - low.minimum;
        dst[l + 32] = high.scale * static_cast<float>(qs[l] >> 4) - high.minimum;
      }
    }
  }
}

void decode_q5_k(const uint8_t* src, float* dst, int64_t blocks) {
  for (; blocks > 0; --blocks, src += 176) {
    const uint8_t* qh = src + 16;
    for (int k = 0; k < 4; ++k, dst += 64) {
      const uint8_t* qs = src + 48 + 32 * k;
      const SubBlock low = sub_block(src, 2 * k);
      const SubBlock high = sub_block(src, 2 * k + 1);
      for (int l = 0; l < 32; ++l) {
        const int q_low = (qs[l] & 15) | (((qh[l] >> (2 * k)) & 1) << 4);
        const int q_high = (qs[l] >> 4) | (((qh[l] >> (2 * k + 1)) & 1) << 4);
        dst[l] = low.scale * static_cast<float>(q_low) - low.minimum;
        dst[l + 32] = high.scale * static_cast<float>(q_high) - high.minimum;
      }
    }
  }
}

void decode_q6_k(const uint8_t* src, float* dst, int64_t blocks) {
  for (; blocks > 0; --blocks, src += 210) {
    const float d = load_fp16(src + 208);
    for (int half = 0; half < 2; ++half, dst += 128) {
      const uint8_t* ql = src + 64 * half;
      const uint8_t* qh = src + 128 + 32 * half;
      const uint8_t* sc = src + 192 + 8 * half;
      for (int quarter = 0; quarter < 4; ++quarter) {
        const uint8_t* lower = ql + 32 * (quarter & 1);
        const int nibble = 4 * (quarter >> 1);
        for (int l = 0; l < 32; ++l) {
          const float scale = d * static_cast<float>(static_cast<int8_t>(sc[2 * quarter + l / 16]));
          const int q = ((lower[l] >> nibble) & 15) | (((qh[l] >> (2 * quarter)) & 3) << 4);
          dst[32 * quarter + l] = scale * static_cast<float>(q - 32);
        }
      }
    }
  }
}

}  // namespace

const GgufPath kGgufScalar = {decode_q4_0, decode_q4_1, decode_q5_0, decode_q5_1,
                              decode_q8_0, decode_q4_k, decode_q5_k, decode_q6_k};

}  // namespace budwood::quant::kernels
