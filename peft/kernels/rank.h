#pragma once

#include <budwood/quant/kernels/gemm.h>

#include <cstdint>

namespace budwood::kernels {

/// out [r, n] = scale * narrowᵀ wide with narrow fp32 [m, r] and wide [m, n]: the gradients of
/// low-rank factors, dA = dtᵀ x and dBᵀ = tᵀ dy. fp32 arithmetic in
/// chains of 64; the same bits with any number of threads.
void gradient_of_factor(const float* narrow, int64_t narrow_stride,
                        const quant::kernels::FloatRows& wide, int64_t m, int64_t r, int64_t n,
                        float scale, float* out, const quant::kernels::Threads& threads);

}  // namespace budwood::kernels
