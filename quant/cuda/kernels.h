#pragma once

#include <budwood/quant/kernels/device/rows_device.h>

#include <cuda_runtime_api.h>

/// Kernels over packed weights. No torch: device pointers and a stream; a call queues work and
/// returns what the launch returned. Codes and blocks need no alignment.
///
/// A weight whose sizes contradict each other, and an id outside it, stop the kernel with a device
/// assertion: nothing is read beyond the parts.
namespace budwood::quant::cuda {

/// y [tokens, rows] = x [tokens, cols] Wᵀ for 1 to kernels::kFewTokens tokens; a warp takes a row,
/// reads each code once and sums in fp32.
template <class Rows>
cudaError_t multiply_few(const Rows& w, const kernels::ConstFloats& x, int tokens,
                         const kernels::Floats& y, cudaStream_t stream);

/// Rows ids[0], ids[1], ... (or begin, begin + 1, ... where ids is null) to dst [count, cols].
template <class Rows>
cudaError_t decode_rows(const Rows& w, int64_t begin, int64_t count, const int64_t* ids,
                        const kernels::Floats& dst, cudaStream_t stream);

/// codes [bnb4_bytes(count)] and absmax [bnb4_blocks(count, block_size)], with the CPU's bytes.
/// first_bad is set to the first element that is NaN or infinite, or to UINT64_MAX; when it is an
/// element the rest is not to be used.
cudaError_t encode_bnb4(const kernels::Bnb4Source& source, uint8_t* codes, float* absmax,
                        unsigned long long* first_bad, cudaStream_t stream);

}  // namespace budwood::quant::cuda
