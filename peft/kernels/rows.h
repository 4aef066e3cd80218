#pragma once

#include <budwood/quant/kernels/gemm.h>

#include <cstdint>

/// Norms, gated activations and rotary embeddings, row by row, forward and backward.
///
/// m rows of fp32, bf16 or fp16, any number of elements apart; arithmetic is fp32. Sums over rows
/// are taken in a fixed order, so results do not depend on the number of threads. Outputs may lie
/// where an input of the same shape lies.
namespace budwood::kernels {

using quant::kernels::FloatRows;
using quant::kernels::FloatType;
using quant::kernels::MutableFloatRows;
using quant::kernels::Threads;

/// y = x / sqrt(mean(x^2) + eps) ∘ weight over n columns (arXiv 1910.07467). As transformers
/// does, a 16-bit x is rounded once more before the product with weight.
void rms_norm(const FloatRows& x, int64_t m, int64_t n, const float* weight, float eps,
              const MutableFloatRows& y, const Threads& threads);

/// dx from grad = dy and x, and where it is not null dweight [n], replaced.
void rms_norm_backward(const FloatRows& grad, const FloatRows& x, int64_t m, int64_t n,
                       const float* weight, float eps, const MutableFloatRows& dx, float* dweight,
                       const Threads& threads);

/// y = (x - mean) / sqrt(var + eps) ∘ weight + bias (arXiv 1607.06450), var over n.
void layer_norm(const FloatRows& x, int64_t m, int64_t n, const float* weight, const float* bias,
                float eps, const MutableFloatRows& y, const Threads& threads);

/// As rms_norm_backward's; dweight and dbias [n] together or neither.
void layer_norm_backward(const FloatRows& grad, const FloatRows& x, int64_t m, int64_t n,
                         const float* weight, float eps, const MutableFloatRows& dx, float* dweight,
                         float* dbias, const Threads& threads);

/// sums [n] = the sum over rows of a ∘ b, replaced.
void sum_products(const FloatRows& a, const FloatRows& b, int64_t m, int64_t n, float* sums,
                  const Threads& threads);

/// What multiplies `up`: x sigmoid(x), or Gauss' x Φ(x), exactly or by tanh (arXiv 2002.05202).
enum class Gate { silu, gelu, gelu_tanh };

/// y = gate(g) ∘ u.
void gated(Gate gate, const FloatRows& g, const FloatRows& u, int64_t m, int64_t n,
           const MutableFloatRows& y, const Threads& threads);
void gated_backward(Gate gate, const FloatRows& grad, const FloatRows& g, const FloatRows& u,
                    int64_t m, int64_t n, const MutableFloatRows& dg, const MutableFloatRows& du,
                    const Threads& threads);

/// Turns the pairs (i, i + width / 2), i < width / 2, of each of `heads` stretches of d elements of
/// a row by the row's angles: cos and sin [m, width / 2]. Elements from width to d are copied.
/// With `back` the turn is the opposite one, which is also the gradient's.
void rotate(const FloatRows& x, int64_t m, int64_t heads, int64_t d, int64_t width,
            const float* cos, const float* sin, bool back, const MutableFloatRows& y,
            const Threads& threads);

}  // namespace budwood::kernels
