#pragma once

#include <cstdint>

/// The inner loops of gemm.h, one version per instruction set.
namespace budwood::quant::kernels {

/// Columns of a panel, which lies [k][kPanelWidth].
constexpr int64_t kPanelWidth = 64;
/// Most rows of x that meet a panel at once, in fp32.
constexpr int64_t kTileRows = 6;
/// Most rows of W and of x that dot() takes.
constexpr int64_t kDotRows = 4;

/// c[i][j] = sum over k of a[i][k] b[k][j] + bias[j] (+ c[i][j] where add is set), for i in
/// [0, rows), j in [0, width).
struct Tile {
  int64_t rows = 0;   ///< 1 to kTileRows, or to rows of a Bf16Path
  int64_t width = 0;  ///< 16, 32, 48 or 64
  const void* a = nullptr;
  int64_t a_stride = 0;
  const void* b = nullptr;
  int64_t b_stride = 0;
  int64_t k = 0;
  const float* bias = nullptr;
  float* c = nullptr;
  int64_t c_stride = 0;
  bool add = false;
};

struct GemmPath {
  /// a and b are fp32, chains of fused multiply-adds in the order of k.
  void (*tile)(const Tile& tile);
  /// panel[c * kPanelWidth + r] = src[r * stride + c], r in [0, 16), c in [0, cols). Moves 32 bits
  /// at a time and reads none of them as a number.
  void (*transpose)(const float* src, int64_t stride, int64_t cols, float* panel);
  /// out[r * kDotRows + t] = sum over i of w[r * w_stride + i] * x[t * x_stride + i]: element i is
  /// fused into partial sum i % 16; the upper half of those is added to the lower, four times.
  void (*dot)(const float* w, int64_t w_stride, int64_t rows, const float* x, int64_t x_stride,
              int64_t tokens, int64_t n, float* out);
};

extern const GemmPath kGemmScalar;
extern const GemmPath kGemmAvx2;
extern const GemmPath kGemmAvx512;

/// bf16 arithmetic with fp32 sums. Elements travel in pairs of consecutive k, the lower one first:
/// k, a_stride and b_stride of a Tile count pairs; its bias is not used.
struct Bf16Path {
  int64_t rows;    ///< most of a tile
  int64_t step;    ///< k of a tile, in elements, is a multiple of this; what is missing is zeros
  int64_t chain;   ///< most elements of k in one tile
  int64_t panels;  ///< side by side at least, so that rows of x are read once for all
  void (*tile)(const Tile& tile);
  /// Gives back the registers that the calling thread's tiles took.
  void (*release)();
};
extern const Bf16Path kGemmBf16;  ///< AVX512_BF16
extern const Bf16Path kGemmAmx;   ///< AMX_BF16: 32 by 32 sums in tile registers

/// The one in use, where has_avx512_bf16().
const Bf16Path& bf16_path();

/// Moves bf16 for either path; AVX512_BF16.
struct Bf16Moves {
  /// n floats to n bf16.
  void (*round)(const float* src, int64_t n, uint16_t* dst);
  /// dst[2 * i] = first[i], dst[2 * i + 1] = second[i].
  void (*zip)(const uint16_t* first, const uint16_t* second, int64_t n, uint16_t* dst);
};
extern const Bf16Moves kBf16Moves;

}  // namespace budwood::quant::kernels
