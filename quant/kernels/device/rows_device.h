#pragma once

#include <budwood/quant/kernels/device/affine_device.h>
#include <budwood/quant/kernels/device/bnb4_device.h>
#include <budwood/quant/kernels/device/gguf_device.h>

#include <cmath>
#include <variant>

/// What one thread of the kernels does. A packed matrix is a type Rows that has
///   rows, cols
///   kGap       a run is 8 elements of a row: four, and four more kGap columns after the first
///   open()     false when its sizes do not fit each other
///   run()      decodes run `index` of a row; columns beyond the row are zeros
///   kTableSize and table_entry(), or 0: a table that the kernel makes once, member `table`
namespace budwood::quant::kernels {

/// Any packed matrix; pointers are the device's own.
using AnyRows =
    std::variant<Bnb4Rows, AffineRows<4>, AffineRows<8>, Int8Rows, GgufRows<GgmlType::q4_0>,
                 GgufRows<GgmlType::q4_1>, GgufRows<GgmlType::q5_0>, GgufRows<GgmlType::q5_1>,
                 GgufRows<GgmlType::q8_0>, GgufRows<GgmlType::q4_k>, GgufRows<GgmlType::q5_k>,
                 GgufRows<GgmlType::q6_k>>;

/// Tokens that are multiplied while a row is decoded.
constexpr int kFewTokens = 8;

BUDWOOD_HOST_DEVICE inline int64_t runs_of(int64_t cols) {
  return (cols + 7) / 8;
}

/// First column of a run; its other half begins kGap later.
template <class Rows>
BUDWOOD_HOST_DEVICE int64_t run_column(int64_t index) {
  constexpr int kRuns = Rows::kGap / 4;
  return index / kRuns * (2 * Rows::kGap) + index % kRuns * 4;
}

/// Run `index` of row `from` to row `to` of dst [.., cols].
template <class Rows>
BUDWOOD_HOST_DEVICE void decode_run(const Rows& w, int64_t from, int64_t index, const Floats& dst,
                                    int64_t to) {
  float values[8];
  w.run(from, index, values);
  const int64_t column = run_column<Rows>(index);
  for (int half = 0; half < 2; ++half) {
    const int64_t begin = column + half * Rows::kGap;
    if (begin + 4 <= w.cols)
      dst.set_four(to * w.cols + begin, values + 4 * half);
    else
      for (int64_t i = begin; i < w.cols; ++i) dst.set(to * w.cols + i, values[i - column]);
  }
}

/// Adds the products of the row's runs lane, lane + lanes, ... with x [tokens, cols] to
/// sums [tokens]. kTokens is the most that tokens may be.
template <int kTokens, class Rows>
BUDWOOD_HOST_DEVICE void multiply_lane(const Rows& w, int64_t row, int lane, int lanes,
                                       const ConstFloats& x, int tokens, float* sums) {
  const int64_t runs = runs_of(w.cols);
  for (int64_t index = lane; index < runs; index += lanes) {
    float values[8];
    w.run(row, index, values);
    const int64_t column = run_column<Rows>(index);
    const bool whole = column + Rows::kGap + 4 <= w.cols;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int m = 0; m < kTokens; ++m) {
      if (m >= tokens) break;
      const int64_t base = m * w.cols;
      float inputs[8];
      if (whole) {
        x.four(base + column, inputs);
        x.four(base + column + Rows::kGap, inputs + 4);
      } else {  // never where the halves are apart
        for (int i = 0; i < 8; ++i)
          inputs[i] = column + i < w.cols ? x.at(base + column + i) : 0.0f;
      }
      for (int i = 0; i < 8; ++i) sums[m] = std::fma(values[i], inputs[i], sums[m]);
    }
  }
}

}  // namespace budwood::quant::kernels
