#pragma once

#include <cstdint>

/// The versions of half.h's row conversions, one per instruction set.
namespace budwood::quant::kernels {

struct HalfPath {
  void (*fp16_to_fp32)(const uint16_t* src, float* dst, int64_t n);
  void (*bf16_to_fp32)(const uint16_t* src, float* dst, int64_t n);
  void (*fp32_to_fp16)(const float* src, uint16_t* dst, int64_t n);
  void (*fp32_to_bf16)(const float* src, uint16_t* dst, int64_t n);
};

extern const HalfPath kHalfScalar;
extern const HalfPath kHalfAvx2;
extern const HalfPath kHalfAvx512;

}  // namespace budwood::quant::kernels
