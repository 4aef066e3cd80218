#pragma once

#include <budwood/peft/kernels/product_loops.h>
#include <budwood/peft/kernels/rank_paths.h>

namespace budwood::kernels {
namespace {

void rank_product(const float* narrow, int64_t narrow_stride, const float* wide,
                  int64_t wide_stride, int64_t m, int64_t r, float* out, bool add) {
  // Half as many vectors and twice as many rows as product(): the wide operand is read less often.
  constexpr int kVectors = 2;
  for (int64_t j = 0; j < kRankColumns; j += kVectors * kLanes)
    tiles<kLanes == 16 ? 8 : 4, kVectors>(r, m, {narrow, 1, narrow_stride}, {wide + j, wide_stride},
                                          out + j, kRankColumns, add);
}

constexpr RankPath kRankPath = {rank_product};

}  // namespace
}  // namespace budwood::kernels
