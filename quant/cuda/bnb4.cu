#include <budwood/quant/cuda/rows_kernels.cuh>

namespace budwood::quant::cuda {
namespace {

/// A warp encodes a block.
__global__ void encode_bnb4_kernel(kernels::Bnb4Source source, int64_t blocks, uint8_t* codes,
                                   float* absmax, unsigned long long* first_bad) {
  __shared__ float thresholds[15];
  if (threadIdx.x < 15) thresholds[threadIdx.x] = kernels::bnb4_threshold(source.type, threadIdx.x);
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (block >= blocks) return;
  uint32_t most = kernels::bnb4_largest_bits(source, block, lane, kWarp);
  for (int step = kWarp / 2; step > 0; step /= 2)
    most = max(most, __shfl_xor_sync(0xffffffffu, most, step));
  if (most >= 0x7f800000u) {
    const int64_t bad = kernels::bnb4_first_not_finite(source, block, lane, kWarp);
    if (bad >= 0) atomicMin(first_bad, static_cast<unsigned long long>(bad));
    return;
  }
  const float scale = kernels::bnb4_encode(source, thresholds, block, most, lane, kWarp, codes);
  if (lane == 0) absmax[block] = scale;
}

}  // namespace

cudaError_t encode_bnb4(const kernels::Bnb4Source& source, uint8_t* codes, float* absmax,
                        unsigned long long* first_bad, cudaStream_t stream) {
  const int64_t blocks = kernels::bnb4_blocks(source.count, source.block_size);
  const int64_t grid = (blocks + kWarpsPerBlock - 1) / kWarpsPerBlock;
  if (source.count < 1 || grid > INT32_MAX) return cudaErrorInvalidValue;
  const auto cleared = cudaMemsetAsync(first_bad, 0xff, sizeof *first_bad, stream);
  if (cleared != cudaSuccess) return cleared;
  encode_bnb4_kernel<<<static_cast<unsigned>(grid), kWarp * kWarpsPerBlock, 0, stream>>>(
      source, blocks, codes, absmax, first_bad);
  return cudaGetLastError();
}

}  // namespace budwood::quant::cuda

BUDWOOD_INSTANTIATE_ROWS(budwood::quant::kernels::Bnb4Rows)
