#pragma once

#include <cstdint>

/// The versions of dot.h's inner loop, one per instruction set.
namespace budwood::quant::kernels {

constexpr int64_t kDotLanes = 64;

struct DotPath {
  /// Adds the products of the first n elements, n a multiple of kDotLanes, to lanes [kDotLanes].
  void (*accumulate)(const float* w, const float* x, int64_t n, float* lanes);
};

extern const DotPath kDotScalar;
extern const DotPath kDotAvx2;
extern const DotPath kDotAvx512;

}  // namespace budwood::quant::kernels
