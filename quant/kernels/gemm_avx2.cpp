#include <budwood/quant/kernels/gemm_paths.h>
#include <budwood/quant/kernels/vectors_avx2.h>

namespace budwood::quant::kernels {
namespace {

/// Columns [from, from + 16).
template <int R>
void tile_of(const Tile& t, int64_t from) {
  __m256 sums[R][2];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    sums[r][0] = sums[r][1] = _mm256_setzero_ps();
  }
  const auto* a = static_cast<const float*>(t.a);
  const auto* b = static_cast<const float*>(t.b) + from;
  for (int64_t k = 0; k < t.k; ++k, ++a, b += t.b_stride) {
    const __m256 left = _mm256_loadu_ps(b), right = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m256 value = _mm256_broadcast_ss(a + r * t.a_stride);
      sums[r][0] = _mm256_fmadd_ps(value, left, sums[r][0]);
      sums[r][1] = _mm256_fmadd_ps(value, right, sums[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* c = t.c + r * t.c_stride + from + 8 * v;
      __m256 sum = sums[r][v];
      if (t.bias != nullptr) {
        sum = _mm256_add_ps(sum, _mm256_loadu_ps(t.bias + from + 8 * v));
      }
      if (t.add) {
        sum = _mm256_add_ps(_mm256_loadu_ps(c), sum);
      }
      _mm256_storeu_ps(c, sum);
    }
  }
}

void tile(const Tile& t) {
  static constexpr void (*kByRows[kTileRows])(const Tile&, int64_t) = {
      tile_of<1>, tile_of<2>, tile_of<3>, tile_of<4>, tile_of<5>, tile_of<6>};
  for (int64_t from = 0; from < t.width; from += 16) {
    kByRows[t.rows - 1](t, from);
  }
}

/// 8 rows of 8 to 8 columns of 8.
inline __attribute__((always_inline)) void transpose_8(const float* src, int64_t stride,
                                                       float* panel) {
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 even = _mm256_loadu_ps(src + 2 * i * stride);
    const __m256 odd = _mm256_loadu_ps(src + (2 * i + 1) * stride);
    t[2 * i] = _mm256_unpacklo_ps(even, odd);
    t[2 * i + 1] = _mm256_unpackhi_ps(even, odd);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(panel + j * kPanelWidth, _mm256_permute2f128_ps(u[j], u[4 + j], 0x20));
    _mm256_storeu_ps(panel + (4 + j) * kPanelWidth, _mm256_permute2f128_ps(u[j], u[4 + j], 0x31));
  }
}

void transpose(const float* src, int64_t stride, int64_t cols, float* panel) {
  for (; cols >= 8; cols -= 8, src += 8, panel += 8 * kPanelWidth) {
    transpose_8(src, stride, panel);
    transpose_8(src + 8 * stride, stride, panel + 8);
  }
  const auto* from = reinterpret_cast<const char*>(src);
  for (int64_t c = 0; c < cols; ++c) {
    for (int64_t r = 0; r < 16; ++r) {
      std::memcpy(panel + c * kPanelWidth + r, from + 4 * (r * stride + c), 4);
    }
  }
}

float sum_of(__m256 lower, __m256 upper) {
  const __m256 eight = _mm256_add_ps(lower, upper);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <int R, int T>
void dot_of(const float* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t n,
            float* out) {
  __m256 sums[R][T][2];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
      sums[r][t][0] = sums[r][t][1] = _mm256_setzero_ps();
    }
  }
  const auto half = [&](int v, auto load) {
    __m256 columns[T];
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
      columns[t] = load(x + t * x_stride);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m256 row = load(w + r * w_stride);
#pragma GCC unroll 2
      for (int t = 0; t < T; ++t) {
        sums[r][t][v] = _mm256_fmadd_ps(row, columns[t], sums[r][t][v]);
      }
    }
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    half(0, [i](const float* p) { return _mm256_loadu_ps(p + i); });
    half(1, [i](const float* p) { return _mm256_loadu_ps(p + i + 8); });
  }
  if (i < n) {
    const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const auto left = static_cast<int>(n - i);
    const __m256i lower = _mm256_cmpgt_epi32(_mm256_set1_epi32(left), places);
    const __m256i upper = _mm256_cmpgt_epi32(_mm256_set1_epi32(left - 8), places);
    half(0, [=](const float* p) { return _mm256_maskload_ps(p + i, lower); });
    half(1, [=](const float* p) { return _mm256_maskload_ps(p + i + 8, upper); });
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
      out[r * kDotRows + t] = sum_of(sums[r][t][0], sums[r][t][1]);
    }
  }
}

void dot(const float* w, int64_t w_stride, int64_t rows, const float* x, int64_t x_stride,
         int64_t tokens, int64_t n, float* out) {
  if (tokens == 1 && rows == kDotRows) {
    return dot_of<4, 1>(w, w_stride, x, x_stride, n, out);
  }
  static constexpr decltype(&dot_of<1, 1>) kDots[2][2] = {{dot_of<1, 1>, dot_of<1, 2>},
                                                          {dot_of<2, 1>, dot_of<2, 2>}};
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t t = 0; t < tokens; t += 2) {
      kDots[rows - r > 1][tokens - t > 1](w + r * w_stride, w_stride, x + t * x_stride, x_stride, n,
                                          out + r * kDotRows + t);
    }
  }
}

}  // namespace

const GemmPath kGemmAvx2 = {tile, transpose, dot};

}  // namespace budwood::quant::kernels
