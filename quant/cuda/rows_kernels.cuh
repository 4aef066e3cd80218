#pragma once

// Assertions stay in release builds: they guard memory that the host cannot see.
#undef NDEBUG
#include <budwood/quant/cuda/kernels.h>

#include <algorithm>
#include <cassert>

namespace budwood::quant::cuda {

using kernels::ConstFloats;
using kernels::Floats;
using kernels::kFewTokens;

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;

/// Makes w ready in every thread of a block: its table in shared memory, its sizes checked.
template <class Rows>
__device__ void open_in_block(Rows& w) {
  if constexpr (Rows::kTableSize > 0) {
    __shared__ float table[Rows::kTableSize];
    for (int i = threadIdx.x; i < Rows::kTableSize; i += blockDim.x) table[i] = w.table_entry(i);
    w.table = table;
    __syncthreads();
  }
  const bool sizes_fit = w.open();
  assert(sizes_fit && "the sizes of a packed weight contradict each other");
}

template <int kTokens, class Rows>
__global__ void multiply_few_kernel(Rows w, ConstFloats x, int tokens, Floats y) {
  open_in_block(w);
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= w.rows) return;
  float sums[kTokens] = {};
  kernels::multiply_lane<kTokens>(w, row, lane, kWarp, x, tokens, sums);
#pragma unroll
  for (int m = 0; m < kTokens; ++m) {
    for (int step = kWarp / 2; step > 0; step /= 2)
      sums[m] += __shfl_down_sync(0xffffffffu, sums[m], step);
    if (lane == 0 && m < tokens) y.set(m * w.rows + row, sums[m]);
  }
}

template <class Rows>
__global__ void decode_rows_kernel(Rows w, int64_t begin, int64_t count, const int64_t* ids,
                                   Floats dst) {
  open_in_block(w);
  const int64_t runs = kernels::runs_of(w.cols);
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const int64_t row = ids != nullptr ? ids[i] : begin + i;
    assert(row >= 0 && row < w.rows && "a row outside a packed weight");
    for (int64_t run = threadIdx.x; run < runs; run += blockDim.x)
      kernels::decode_run(w, row, run, dst, i);
  }
}

template <class Rows>
cudaError_t multiply_few(const Rows& w, const ConstFloats& x, int tokens, const Floats& y,
                         cudaStream_t stream) {
  const int64_t blocks = (w.rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
  if (tokens < 1 || tokens > kFewTokens || w.rows < 1 || w.cols < 1 || blocks > INT32_MAX)
    return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks)), threads(kWarp * kWarpsPerBlock);
  if (tokens == 1)
    multiply_few_kernel<1><<<grid, threads, 0, stream>>>(w, x, tokens, y);
  else
    multiply_few_kernel<kFewTokens><<<grid, threads, 0, stream>>>(w, x, tokens, y);
  return cudaGetLastError();
}

template <class Rows>
cudaError_t decode_rows(const Rows& w, int64_t begin, int64_t count, const int64_t* ids,
                        const Floats& dst, cudaStream_t stream) {
  if (count < 0 || w.rows < 1 || w.cols < 1) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  const int64_t runs = kernels::runs_of(w.cols);
  const auto threads = static_cast<unsigned>(std::min<int64_t>(256, (runs + 31) / 32 * 32));
  const auto grid = static_cast<unsigned>(std::min<int64_t>(count, 1 << 16));
  decode_rows_kernel<<<grid, threads, 0, stream>>>(w, begin, count, ids, dst);
  return cudaGetLastError();
}

}  // namespace budwood::quant::cuda

/// Makes the functions of one form.
#define BUDWOOD_INSTANTIATE_ROWS(...)                                       \
  template cudaError_t budwood::quant::cuda::multiply_few(                  \
      const __VA_ARGS__&, const budwood::quant::kernels::ConstFloats&, int, \
      const budwood::quant::kernels::Floats&, cudaStream_t);                \
  template cudaError_t budwood::quant::cuda::decode_rows(                   \
      const __VA_ARGS__&, int64_t, int64_t, const int64_t*,                 \
      const budwood::quant::kernels::Floats&, cudaStream_t);
