#pragma once

#include <budwood/quant/kernels/half.h>
#include <budwood/quant/kernels/matrix.h>

#include <cstdint>
#include <functional>

/// Products with a stored matrix that is never held whole: panels of it are decoded into the second
/// cache, multiplied with all tokens and forgotten.
///
/// fp32 arithmetic: every output is a sum, in order, of chains of 256 fused multiply-adds and of
/// one chain for the low-rank term (up to 8 rows of x, or 32 of W: of 16 chains); the same bits on
/// every instruction set, with any number of threads. bf16 tokens are multiplied in bf16, with fp32
/// sums, where that is faster (bf16_choice.h). A thread needs 0.6 MB, 1.6 MB
/// with AMX, and 256 bytes for each rank, kept for its next product.
namespace budwood::quant::kernels {

/// m rows of floats, `stride` elements apart.
struct FloatRows {
  const void* data = nullptr;
  FloatType type = FloatType::fp32;
  int64_t stride = 0;
};
struct MutableFloatRows {
  void* data = nullptr;
  FloatType type = FloatType::fp32;
  int64_t stride = 0;
};

/// scale * left * right, added to a product. left [m, rank] has contiguous rows; element (k, column
/// of the product) of right lies at k * right_rank_stride + column * right_column_stride.
struct LowRank {
  const float* left = nullptr;
  int64_t left_stride = 0;
  const float* right = nullptr;
  int64_t right_rank_stride = 0;
  int64_t right_column_stride = 0;
  int64_t rank = 0;
  float scale = 1.0f;
};

/// Who runs the threads: run(n, body) calls body(0) ... body(n - 1), each once, and returns when
/// all have; count is the most that run at a time. By default the caller runs everything.
struct Threads {
  int count = 1;
  std::function<void(int, const std::function<void(int)>&)> run = {};
};

struct GemmOptions {
  const float* bias = nullptr;  ///< [columns of y], added to every row
  LowRank low_rank = {};
  bool add = false;    ///< adds to y instead of replacing it
  bool exact = false;  ///< fp32 arithmetic for bf16 tokens too: W is not rounded
  Threads threads = {};
};

/// y [m, w.rows()] = x [m, w.cols()] Wᵀ.
void multiply_transposed(const Matrix& w, const FloatRows& x, int64_t m, const MutableFloatRows& y,
                         const GemmOptions& options = {});

/// y [m, w.cols()] = x [m, w.rows()] W.
void multiply(const Matrix& w, const FloatRows& x, int64_t m, const MutableFloatRows& y,
              const GemmOptions& options = {});

}  // namespace budwood::quant::kernels
