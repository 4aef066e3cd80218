#pragma once

#include <cstdint>

/// Marks what the host compiler and nvcc both compile: the arithmetic of one element or one thread.
/// The tests run it on the host; the kernels of quant/cuda run it on the device.
#ifdef __CUDACC__
#define BUDWOOD_HOST_DEVICE __host__ __device__
#else
#define BUDWOOD_HOST_DEVICE
#endif

namespace budwood::quant::kernels {

// nvcc would fuse a product and a sum, and the bits would no longer be those of the CPU.

BUDWOOD_HOST_DEVICE static inline float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

BUDWOOD_HOST_DEVICE static inline float rounded_sum(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

/// True when p is a multiple of `bytes`.
BUDWOOD_HOST_DEVICE static inline bool is_aligned(const void* p, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

BUDWOOD_HOST_DEVICE static inline uint32_t load_u16(const uint8_t* p) {
  return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8;
}

/// Four bytes, the lowest address in the lowest bits.
BUDWOOD_HOST_DEVICE static inline uint32_t load_u32(const uint8_t* p) {
#ifdef __CUDA_ARCH__
  if (is_aligned(p, 4)) return *reinterpret_cast<const uint32_t*>(p);
  if (is_aligned(p, 2)) {
    const auto* halves = reinterpret_cast<const uint16_t*>(p);
    return halves[0] | static_cast<uint32_t>(halves[1]) << 16;
  }
#endif
  return load_u16(p) | load_u16(p + 2) << 16;
}

BUDWOOD_HOST_DEVICE static inline int byte_of(uint32_t word, int i) {
  return static_cast<int>(word >> (8 * i) & 255u);
}

}  // namespace budwood::quant::kernels
