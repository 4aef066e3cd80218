#include <budwood/quant/kernels/gemm_paths.h>
#include <immintrin.h>

namespace budwood::quant::kernels {
namespace {

// A tile register holds 16 rows of 64 bytes: 16 sums, or 16 pairs. Registers 0 to 3 hold the sums
// of 32 rows by 32 columns, 4 and 5 rows of a, 6 and 7 columns of b.
constexpr int64_t kSide = 16;

struct alignas(64) Configuration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
};

// For so many rows of a the registers of this thread are set up.
thread_local int64_t configured = 0;

void configure(int64_t rows) {
  if (rows == configured) {
    return;
  }
  Configuration to;
  const auto upper = static_cast<uint8_t>(rows < kSide ? rows : kSide);
  const auto lower = static_cast<uint8_t>(rows > kSide ? rows - kSide : upper);
  to.rows[0] = to.rows[1] = to.rows[4] = upper;
  to.rows[2] = to.rows[3] = to.rows[5] = lower;
  to.rows[6] = to.rows[7] = kSide;
  _tile_loadconfig(&to);
  configured = rows;
}

void release() {
  if (configured != 0) {
    _tile_release();
    configured = 0;
  }
}

// 16 or 32 rows by 16 or 32 columns, from column `at` on.
template <bool TwoRows, bool TwoColumns>
void tile_of(const Tile& t, int64_t at) {
  float* c = t.c + at;
  const auto c_stride = static_cast<size_t>(t.c_stride) * 4;
  float* lower_c = c + kSide * t.c_stride;
  if (t.add) {
    _tile_loadd(0, c, c_stride);
    if constexpr (TwoColumns) _tile_loadd(1, c + kSide, c_stride);
    if constexpr (TwoRows) _tile_loadd(2, lower_c, c_stride);
    if constexpr (TwoRows && TwoColumns) _tile_loadd(3, lower_c + kSide, c_stride);
  } else {
    _tile_zero(0);
    if constexpr (TwoColumns) _tile_zero(1);
    if constexpr (TwoRows) _tile_zero(2);
    if constexpr (TwoRows && TwoColumns) _tile_zero(3);
  }
  const auto a_stride = static_cast<size_t>(t.a_stride) * 4;
  const auto b_stride = static_cast<size_t>(t.b_stride) * 4;
  const char* a = static_cast<const char*>(t.a);
  const char* b = static_cast<const char*>(t.b) + 4 * at;
  for (int64_t k = 0; k < t.k; k += kSide, a += 4 * kSide, b += kSide * 4 * t.b_stride) {
    _tile_loadd(6, b, b_stride);
    _tile_loadd(4, a, a_stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (TwoColumns) {
      _tile_loadd(7, b + 4 * kSide, b_stride);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (TwoRows) {
      _tile_loadd(5, a + kSide * 4 * t.a_stride, a_stride);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (TwoRows && TwoColumns) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_stride);
  if constexpr (TwoColumns) _tile_stored(1, c + kSide, c_stride);
  if constexpr (TwoRows) _tile_stored(2, lower_c, c_stride);
  if constexpr (TwoRows && TwoColumns) _tile_stored(3, lower_c + kSide, c_stride);
}

template <bool TwoRows>
void parts(const Tile& t) {
  int64_t at = 0;
  for (; at + 2 * kSide <= t.width; at += 2 * kSide) {
    tile_of<TwoRows, true>(t, at);
  }
  if (at < t.width) {
    tile_of<TwoRows, false>(t, at);
  }
}

void tile(const Tile& t) {
  configure(t.rows);
  t.rows > kSide ? parts<true>(t) : parts<false>(t);
}

}  // namespace

const Bf16Path kGemmAmx = {.rows = 2 * kSide,
                           .step = 2 * kSide,
                           .chain = 2048,
                           .panels = 4,
                           .tile = tile,
                           .release = release};

}  // namespace budwood::quant::kernels
