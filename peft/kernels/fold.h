#pragma once

#include <budwood/quant/kernels/half.h>

#include <cstdint>

/// What folding adapters into a weight is made of: panels of rows in fp64, to which products of
/// factors are added, and which are rounded once. The same bits on every instruction set.
namespace budwood::kernels {

using quant::kernels::FloatType;

/// n elements of `type` to fp64.
void widen(FloatType type, const void* src, double* dst, int64_t n);

/// n numbers to elements of `type`, each rounded once, to nearest even. False when one of the
/// results is not finite.
bool round_once(const double* src, FloatType type, void* dst, int64_t n);

/// A factor of a product: element (i, k) is scale times the number at i * stride + k * rank_stride,
/// k counting the ranks.
struct Factor {
  const float* data = nullptr;
  int64_t stride = 0;
  int64_t rank_stride = 0;
  double scale = 1.0;
};

/// panel [rows, cols], contiguous, += left right with left (row, k) and right (column, k). Every
/// number is a sum over the ranks in their order, each product added before it is rounded.
void add_product(double* panel, int64_t rows, int64_t cols, Factor left, Factor right,
                 int64_t rank);

/// Sums over n numbers W before a change, W + D after it, and R as written; each in 8 chains.
struct FoldSums {
  double weight = 0;  ///< W²
  double delta = 0;   ///< D²
  double left = 0;    ///< (R - W) D
  double error = 0;   ///< (R - W - D)²
  void add(const FoldSums& other);
};
FoldSums sums_of(const double* before, const double* after, const double* written, int64_t n);

/// round_once of `after`, and the sums, in one pass over the memory. `before` are elements of
/// `stored`.
bool round_and_sum(FloatType stored, const void* before, const double* after, FloatType type,
                   void* dst, int64_t n, FoldSums& sums);

/// sums[j] += the squares of column j of a panel [rows, cols], one row after the other.
void add_column_squares(const double* panel, int64_t rows, int64_t cols, double* sums);
/// The sum of n squares, one after the other.
double sum_of_squares(const double* values, int64_t n);

}  // namespace budwood::kernels
