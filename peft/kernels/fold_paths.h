#pragma once

#include <cstdint>

/// The inner loops of fold.h.
namespace budwood::kernels {

/// Columns of a product that are in the first cache with their factor.
constexpr int64_t kFoldColumns = 256;
/// Chains of a sum: number i is in chain i % kFoldChains.
constexpr int64_t kFoldChains = 8;

struct FoldPath {
  /// sums [rows, cols], rows `stride` apart, += left [rows, rank] right [rank, kFoldColumns]; cols
  /// is a multiple of 8 up to kFoldColumns.
  void (*add_rows)(double* sums, int64_t stride, int64_t rows, int64_t cols, const double* left,
                   const double* right, int64_t rank);
  void (*bf16_to_fp64)(const uint16_t* src, double* dst, int64_t n);
  void (*fp32_to_fp64)(const float* src, double* dst, int64_t n);
  bool (*round_fp32)(const double* src, float* dst, int64_t n);
  bool (*round_bf16)(const double* src, uint16_t* dst, int64_t n);
  /// Floats from which a shorter type is rounded as from the numbers themselves.
  void (*round_to_odd)(const double* src, float* dst, int64_t n);
  /// Adds the terms of the four FoldSums to their chains; n is a multiple of kFoldChains.
  void (*add_sums)(const double* before, const double* after, const double* written, int64_t n,
                   double (*sums)[kFoldChains]);
};

extern const FoldPath kFoldScalar;
extern const FoldPath kFoldAvx2;
extern const FoldPath kFoldAvx512;

}  // namespace budwood::kernels
