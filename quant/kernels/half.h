#pragma once

#include <budwood/quant/kernels/device/host_device.h>

#include <cstdint>
#include <cstring>

/// Conversions between fp32 and the two 16-bit floats, which travel as uint16_t.
///
/// To 16 bits: round to nearest even, overflow to infinity, subnormals kept. A NaN stays a NaN of
/// the same sign, made quiet, with the upper bits of its payload.
namespace budwood::quant::kernels {

/// Element type of a dequantised result.
enum class FloatType { fp32, bf16, fp16 };

/// Bytes of one element.
constexpr int64_t float_bytes(FloatType type) {
  return type == FloatType::fp32 ? 4 : 2;
}

void fp16_to_fp32(const uint16_t* src, float* dst, int64_t n);
void bf16_to_fp32(const uint16_t* src, float* dst, int64_t n);
void fp32_to_fp16(const float* src, uint16_t* dst, int64_t n);
void fp32_to_bf16(const float* src, uint16_t* dst, int64_t n);

/// n floats to n elements of `type` at dst, and back; fp32 is a copy.
void fp32_to(FloatType type, const float* src, void* dst, int64_t n);
void to_fp32(FloatType type, const void* src, float* dst, int64_t n);

// One element. Static, so that no file compiled for a wider instruction set lends its copy to
// others.

BUDWOOD_HOST_DEVICE static inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

BUDWOOD_HOST_DEVICE static inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

BUDWOOD_HOST_DEVICE static inline float bf16_to_fp32(uint16_t half) {
  return float_from_bits(static_cast<uint32_t>(half) << 16);
}

BUDWOOD_HOST_DEVICE static inline uint16_t fp32_to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return static_cast<uint16_t>((bits >> 16) | 0x40u);
  }
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

BUDWOOD_HOST_DEVICE static inline float fp16_to_fp32(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0) {
    // mantissa * 2^-24 is exact.
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return float_from_bits(sign | float_bits(magnitude));
  }
  if (exponent == 31) {
    const uint32_t quiet = mantissa == 0 ? 0u : 0x400000u;
    return float_from_bits(sign | 0x7f800000u | quiet | (mantissa << 13));
  }
  return float_from_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

BUDWOOD_HOST_DEVICE static inline uint16_t fp32_to_fp16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  }
  if (magnitude >= 0x477ff000u) {  // 65520, halfway to what 65504's successor would be
    return static_cast<uint16_t>(sign | 0x7c00u);
  }
  if (magnitude < 0x38800000u) {  // below 2^-14: the sum's last bit is worth 2^-24
    const float sum = float_from_bits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_bits(sum) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

}  // namespace budwood::quant::kernels
