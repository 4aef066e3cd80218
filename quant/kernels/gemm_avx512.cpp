#include <budwood/quant/kernels/gemm_paths.h>
#include <budwood/quant/kernels/vectors_avx512.h>

namespace budwood::quant::kernels {
namespace {

template <int R, int V>
void tile_of(const Tile& t) {
  __m512 sums[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sums[r][v] = _mm512_setzero_ps();
    }
  }
  const auto* a = static_cast<const float*>(t.a);
  const auto* b = static_cast<const float*>(t.b);
  for (int64_t k = 0; k < t.k; ++k, ++a, b += t.b_stride) {
    __m512 columns[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      columns[v] = _mm512_loadu_ps(b + 16 * v);
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m512 value = _mm512_set1_ps(a[r * t.a_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sums[r][v] = _mm512_fmadd_ps(value, columns[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* c = t.c + r * t.c_stride + 16 * v;
      __m512 sum = sums[r][v];
      if (t.bias != nullptr) {
        sum = _mm512_add_ps(sum, _mm512_loadu_ps(t.bias + 16 * v));
      }
      if (t.add) {
        sum = _mm512_add_ps(_mm512_loadu_ps(c), sum);
      }
      _mm512_storeu_ps(c, sum);
    }
  }
}

using TileOf = void (*)(const Tile&);

template <int V>
constexpr TileOf kTiles[kTileRows] = {tile_of<1, V>, tile_of<2, V>, tile_of<3, V>,
                                      tile_of<4, V>, tile_of<5, V>, tile_of<6, V>};

void tile(const Tile& t) {
  static constexpr const TileOf* kByWidth[] = {kTiles<1>, kTiles<2>, kTiles<3>, kTiles<4>};
  kByWidth[t.width / 16 - 1][t.rows - 1](t);
}

/// 16 rows of 16 to 16 columns of 16.
inline __attribute__((always_inline)) void transpose_16(const __m512* in, float* panel) {
  __m512 t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(in[2 * i], in[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(in[2 * i], in[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    u[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    u[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    u[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    u[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  // u[4 g + j] holds columns j, 4 + j, 8 + j, 12 + j of rows 4 g to 4 g + 3, a quarter each.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even_low = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    _mm512_storeu_ps(panel + j * kPanelWidth, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
    _mm512_storeu_ps(panel + (4 + j) * kPanelWidth, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_ps(panel + (8 + j) * kPanelWidth,
                     _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
    _mm512_storeu_ps(panel + (12 + j) * kPanelWidth, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
  }
}

void transpose(const float* src, int64_t stride, int64_t cols, float* panel) {
  __m512 rows[16];
  for (; cols >= 16; cols -= 16, src += 16, panel += 16 * kPanelWidth) {
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      rows[r] = _mm512_loadu_ps(src + r * stride);
    }
    transpose_16(rows, panel);
  }
  if (cols > 0) {
    float last[16 * kPanelWidth];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      rows[r] = _mm512_maskz_loadu_ps(first_lanes(cols), src + r * stride);
    }
    transpose_16(rows, last);
    for (int64_t c = 0; c < cols; ++c) {
      _mm512_storeu_ps(panel + c * kPanelWidth, _mm512_loadu_ps(last + c * kPanelWidth));
    }
  }
}

template <int R, int T>
void dot_of(const float* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t n,
            float* out) {
  __m512 sums[R][T];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      sums[r][t] = _mm512_setzero_ps();
    }
  }
  const auto step = [&](int64_t i, __mmask16 lanes) {
    __m512 columns[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      columns[t] = _mm512_maskz_loadu_ps(lanes, x + t * x_stride + i);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512 row = _mm512_maskz_loadu_ps(lanes, w + r * w_stride + i);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        sums[r][t] = _mm512_fmadd_ps(row, columns[t], sums[r][t]);
      }
    }
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    step(i, 0xffff);
  }
  if (i < n) {
    step(i, first_lanes(n - i));
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      out[r * kDotRows + t] = sum_of(sums[r][t]);
    }
  }
}

using DotOf = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*);

template <int R>
constexpr DotOf kDots[kDotRows] = {dot_of<R, 1>, dot_of<R, 2>, dot_of<R, 3>, dot_of<R, 4>};

void dot(const float* w, int64_t w_stride, int64_t rows, const float* x, int64_t x_stride,
         int64_t tokens, int64_t n, float* out) {
  static constexpr const DotOf* kByRows[] = {kDots<1>, kDots<2>, kDots<3>, kDots<4>};
  kByRows[rows - 1][tokens - 1](w, w_stride, x, x_stride, n, out);
}

}  // namespace

const GemmPath kGemmAvx512 = {tile, transpose, dot};

}  // namespace budwood::quant::kernels
