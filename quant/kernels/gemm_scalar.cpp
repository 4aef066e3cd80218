#include <budwood/quant/kernels/gemm_paths.h>

#include <cmath>
#include <cstring>

namespace budwood::quant::kernels {
namespace {

void tile(const Tile& t) {
  for (int64_t row = 0; row < t.rows; ++row) {
    float sums[kPanelWidth] = {};
    const auto* a = static_cast<const float*>(t.a) + row * t.a_stride;
    const auto* b = static_cast<const float*>(t.b);
    for (int64_t i = 0; i < t.k; ++i, b += t.b_stride) {
      for (int64_t j = 0; j < t.width; ++j) {
        sums[j] = std::fma(a[i], b[j], sums[j]);
      }
    }
    float* c = t.c + row * t.c_stride;
    for (int64_t j = 0; j < t.width; ++j) {
      const float sum = t.bias != nullptr ? sums[j] + t.bias[j] : sums[j];
      c[j] = t.add ? c[j] + sum : sum;
    }
  }
}

void transpose(const float* src, int64_t stride, int64_t cols, float* panel) {
  const auto* from = reinterpret_cast<const char*>(src);
  for (int64_t r = 0; r < 16; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      std::memcpy(panel + c * kPanelWidth + r, from + 4 * (r * stride + c), 4);
    }
  }
}

void dot(const float* w, int64_t w_stride, int64_t rows, const float* x, int64_t x_stride,
         int64_t tokens, int64_t n, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t t = 0; t < tokens; ++t) {
      float lanes[16] = {};
      for (int64_t i = 0; i < n; ++i) {
        lanes[i % 16] = std::fma(w[r * w_stride + i], x[t * x_stride + i], lanes[i % 16]);
      }
      for (int64_t half = 8; half > 0; half /= 2) {
        for (int64_t lane = 0; lane < half; ++lane) {
          lanes[lane] += lanes[lane + half];
        }
      }
      out[r * kDotRows + t] = lanes[0];
    }
  }
}

}  // namespace

const GemmPath kGemmScalar = {tile, transpose, dot};

}  // namespace budwood::quant::kernels
