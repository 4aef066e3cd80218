#pragma once

#include <budwood/quant/kernels/gemm_job.h>

#include <array>
#include <cstdint>

namespace budwood::kernels {

/// The calling thread's memory for the loops of this folder. It grows, and stays.
inline quant::kernels::gemm::Workspace& scratch() {
  thread_local quant::kernels::gemm::Workspace space;
  return space;
}

/// Cuts scratch() into stretches of so many floats, each at a multiple of 64 bytes.
template <size_t count>
std::array<float*, count> scratch_of(const std::array<int64_t, count>& sizes) {
  int64_t total = 0;
  for (const int64_t size : sizes) total += quant::kernels::gemm::round_up(size, 16);
  std::array<float*, count> parts;
  float* at = scratch().floats(total);
  for (size_t i = 0; i < count; ++i) {
    parts[i] = at;
    at += quant::kernels::gemm::round_up(sizes[i], 16);
  }
  return parts;
}

}  // namespace budwood::kernels
