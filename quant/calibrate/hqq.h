#pragma once

#include <budwood/quant/weight.h>
#include <optional>

namespace budwood::quant::calibrate {

struct HqqOptions {
  int64_t bits = 4;         ///< 4 or 8
  int64_t group_size = 64;  ///< columns that share a scale; -1 = a whole row
  int64_t iterations = 20;  ///< 0 = the starting grid
  double norm = 0.7;        ///< p of the error that is made small; below 1
  double beta = 10.0;       ///< weight of the quadratic term, and its growth per iteration
  double beta_growth = 1.01;
  /// Starts from whole zero points; unset = at 4 bits. The zero points become fractions anyway.
  std::optional<bool> round_zero = {};
};

/// Half-quadratic quantisation (HQQ, without data): scales from the smallest and largest values of
/// W [out, in]; the zero point of each group, a float, moves until mean |W - Ŵ| no longer falls.
/// Never worse in that than the starting grid. Throws Error for values that are not finite.
Weight hqq(const at::Tensor& w, const HqqOptions& options = {});

}  // namespace budwood::quant::calibrate
