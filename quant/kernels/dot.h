#pragma once

#include <cstdint>

/// One decoded row against a few tokens.
namespace budwood::quant::kernels {

/// y[t * stride] = sum over i of w[i] * x[t * n + i], for t in [0, tokens). fp32 throughout,
/// products and sums rounded; element i goes to partial sum i % 64, and the 64 are added as a tree.
void dot_rows(const float* w, const float* x, int64_t n, int64_t tokens, float* y, int64_t stride);

}  // namespace budwood::quant::kernels
