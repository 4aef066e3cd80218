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
  const auto* a = static_cast<const char*>(t.a);
  const auto* b = static_cast<const char*>(t.b);
  for (int64_t k = 0; k < t.k; ++k, a += 4, b += 4 * t.b_stride) {
    __m512bh columns[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      columns[v] = (__m512bh)_mm512_loadu_si512(b + 64 * v);
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + 4 * r * t.a_stride, sizeof pair);
      const auto value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], value, columns[v]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* c = t.c + r * t.c_stride + 16 * v;
      __m512 sum = sums[r][v];
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

// Flushes subnormals, as the products do.
void round(const float* src, int64_t n, uint16_t* dst) {
  for (; n >= 32; n -= 32, src += 32, dst += 32) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(src + 16), _mm512_loadu_ps(src));
    _mm512_storeu_si512(dst, (__m512i)pairs);
  }
  for (; n > 0; n -= 16, src += 16, dst += 16) {
    const __mmask16 lanes = first_lanes(n < 16 ? n : 16);
    const __m256bh half = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, src));
    _mm256_mask_storeu_epi16(dst, lanes, (__m256i)half);
  }
}

void zip(const uint16_t* first, const uint16_t* second, int64_t n, uint16_t* dst) {
  for (; n > 0; n -= 16, first += 16, second += 16, dst += 32) {
    const __mmask16 lanes = first_lanes(n < 16 ? n : 16);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, first));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, second));
    const __m512i both = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    _mm512_mask_storeu_epi32(dst, lanes, both);
  }
}

}  // namespace

const Bf16Path kGemmBf16 = {
    .rows = kTileRows, .step = 2, .chain = 256, .panels = 1, .tile = tile, .release = [] {}};
const Bf16Moves kBf16Moves = {.round = round, .zip = zip};

}  // namespace budwood::quant::kernels
