#pragma once

#include <budwood/quant/kernels/device/host_device.h>
#include <budwood/quant/kernels/half.h>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

/// Matrices of fp32, bf16 or fp16 that kernels read and write as fp32, four elements at a time.
namespace budwood::quant::kernels {

/// The hardware's conversions on the device: the same values, but a NaN may lose its payload.
BUDWOOD_HOST_DEVICE static inline float widened_fp16(uint16_t half) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(half));
#else
  return fp16_to_fp32(half);
#endif
}

BUDWOOD_HOST_DEVICE static inline uint16_t rounded_fp16(float value) {
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rn(value));
#else
  return fp32_to_fp16(value);
#endif
}

struct ConstFloats {
  const void* data = nullptr;
  FloatType type = FloatType::fp32;

  BUDWOOD_HOST_DEVICE float at(int64_t i) const {
    switch (type) {
      case FloatType::fp32:
        return static_cast<const float*>(data)[i];
      case FloatType::bf16:
        return bf16_to_fp32(static_cast<const uint16_t*>(data)[i]);
      default:
        return widened_fp16(static_cast<const uint16_t*>(data)[i]);
    }
  }

  /// Elements [i, i + 4).
  BUDWOOD_HOST_DEVICE void four(int64_t i, float* dst) const {
#ifdef __CUDA_ARCH__
    if (type == FloatType::fp32) {
      const float* p = static_cast<const float*>(data) + i;
      if (is_aligned(p, 16)) {
        const float4 v = *reinterpret_cast<const float4*>(p);
        dst[0] = v.x;
        dst[1] = v.y;
        dst[2] = v.z;
        dst[3] = v.w;
        return;
      }
    } else {
      const uint16_t* p = static_cast<const uint16_t*>(data) + i;
      if (is_aligned(p, 8)) {
        const ushort4 v = *reinterpret_cast<const ushort4*>(p);
        const uint16_t halves[4] = {v.x, v.y, v.z, v.w};
        for (int k = 0; k < 4; ++k)
          dst[k] = type == FloatType::bf16 ? bf16_to_fp32(halves[k]) : widened_fp16(halves[k]);
        return;
      }
    }
#endif
    for (int k = 0; k < 4; ++k) dst[k] = at(i + k);
  }
};

struct Floats {
  void* data = nullptr;
  FloatType type = FloatType::fp32;

  BUDWOOD_HOST_DEVICE void set(int64_t i, float value) const {
    switch (type) {
      case FloatType::fp32:
        static_cast<float*>(data)[i] = value;
        return;
      case FloatType::bf16:
        static_cast<uint16_t*>(data)[i] = fp32_to_bf16(value);
        return;
      default:
        static_cast<uint16_t*>(data)[i] = rounded_fp16(value);
    }
  }

  /// Elements [i, i + 4).
  BUDWOOD_HOST_DEVICE void set_four(int64_t i, const float* src) const {
#ifdef __CUDA_ARCH__
    if (type == FloatType::fp32) {
      float* p = static_cast<float*>(data) + i;
      if (is_aligned(p, 16)) {
        *reinterpret_cast<float4*>(p) = make_float4(src[0], src[1], src[2], src[3]);
        return;
      }
    } else {
      uint16_t* p = static_cast<uint16_t*>(data) + i;
      if (is_aligned(p, 8)) {
        uint16_t halves[4];
        for (int k = 0; k < 4; ++k)
          halves[k] = type == FloatType::bf16 ? fp32_to_bf16(src[k]) : rounded_fp16(src[k]);
        *reinterpret_cast<ushort4*>(p) = make_ushort4(halves[0], halves[1], halves[2], halves[3]);
        return;
      }
    }
#endif
    for (int k = 0; k < 4; ++k) set(i + k, src[k]);
  }
};

}  // namespace budwood::quant::kernels
