#pragma once

#include <cstdint>

/// The versions of gguf_blocks.h's decoders and encoders, one per instruction set.
namespace budwood::quant::kernels {

struct GgufPath {
  using Decode = void (*)(const uint8_t* src, float* dst, int64_t blocks);
  Decode q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k;
};

struct GgufEncoders {
  /// Writes one block; false when it holds a NaN, an infinity or needs a scale beyond fp16.
  using Encode = bool (*)(const float* src, uint8_t* dst);
  Encode q4_0, q4_1, q8_0;
};

extern const GgufPath kGgufScalar;
extern const GgufPath kGgufAvx2;
extern const GgufPath kGgufAvx512;

// A block of 32 is too short for AVX-512 to gain anything.
extern const GgufEncoders kGgufEncodeScalar;
extern const GgufEncoders kGgufEncodeAvx2;

}  // namespace budwood::quant::kernels
