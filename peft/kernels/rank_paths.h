#pragma once

#include <cstdint>

/// The inner loop of rank.h.
namespace budwood::kernels {

/// Columns that a task takes.
constexpr int64_t kRankColumns = 64;

struct RankPath {
  /// out [r, kRankColumns] (+)= narrowᵀ wide of m rows.
  void (*product)(const float* narrow, int64_t narrow_stride, const float* wide,
                  int64_t wide_stride, int64_t m, int64_t r, float* out, bool add);
};

extern const RankPath kRankScalar;
extern const RankPath kRankAvx2;
extern const RankPath kRankAvx512;

}  // namespace budwood::kernels
