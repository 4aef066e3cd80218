#pragma once

#include <budwood/peft/kernels/lanes.h>

/// Small products whose left operand may lie either way round.
namespace budwood::kernels {
namespace {

/// Element (row, k) lies at row * row_stride + k * k_stride.
struct Left {
  const float* data;
  int64_t row_stride, k_stride;
};
struct Right {
  const float* data;
  int64_t k_stride;
};

/// c[i][j] (+)= sum over k of a[i][k] b[k][j], i < rows, j < vectors * kLanes.
template <int rows, int vectors>
void tile(int64_t n, const Left& a, const Right& b, float* c, int64_t c_stride, bool add) {
  Floats sums[rows][vectors] = {};
  const float* from = b.data;
  const float* left = a.data;
  for (int64_t k = 0; k < n; ++k, from += b.k_stride, left += a.k_stride) {
    Floats right[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) right[j] = load(from + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Floats value = all(left[i * a.row_stride]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sums[i][j] += value * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      float* to = c + i * c_stride + j * kLanes;
      store(to, add ? load(to) + sums[i][j] : sums[i][j]);
    }
}

template <int rows, int vectors>
void tiles(int64_t m, int64_t n, Left a, const Right& b, float* c, int64_t c_stride, bool add) {
  for (; m >= rows; m -= rows) {
    tile<rows, vectors>(n, a, b, c, c_stride, add);
    a.data += rows * a.row_stride;
    c += rows * c_stride;
  }
  if constexpr (rows > 1) {
    if (m > 0) tiles<rows / 2, vectors>(m, n, a, b, c, c_stride, add);
  }
}

/// The same for any m and a width that is a multiple of kLanes.
inline void product(int64_t m, int64_t width, int64_t n, const Left& a, const Right& b, float* c,
                    int64_t c_stride, bool add) {
  constexpr int kWide = kLanes == 16 ? 4 : 2;
  int64_t j = 0;
  for (; j + kWide * kLanes <= width; j += kWide * kLanes)
    tiles<4, kWide>(m, n, a, {b.data + j, b.k_stride}, c + j, c_stride, add);
  if constexpr (kWide == 4) {
    for (; j + 2 * kLanes <= width; j += 2 * kLanes)
      tiles<8, 2>(m, n, a, {b.data + j, b.k_stride}, c + j, c_stride, add);
  }
  for (; j < width; j += kLanes)
    tiles<8, 1>(m, n, a, {b.data + j, b.k_stride}, c + j, c_stride, add);
}

}  // namespace
}  // namespace budwood::kernels
