#include <budwood/peft/kernels/rank.h>
#include <budwood/peft/kernels/rank_paths.h>
#include <budwood/peft/kernels/scratch.h>
#include <budwood/quant/kernels/isa.h>

#include <algorithm>

namespace budwood::kernels {
namespace {

using quant::kernels::gemm::ceil_div;
using quant::kernels::gemm::place;

// Rows that are in the first cache while all of narrow meets them.
constexpr int64_t kBlockRows = 64;

}  // namespace

void gradient_of_factor(const float* narrow, int64_t narrow_stride,
                        const quant::kernels::FloatRows& wide, int64_t m, int64_t r, int64_t n,
                        float scale, float* out, const quant::kernels::Threads& threads) {
  const RankPath& loops = quant::kernels::active_path(kRankScalar, kRankAvx2, kRankAvx512);
  quant::kernels::gemm::hand_out(threads, ceil_div(n, kRankColumns), m * r * n, [&] {
    const auto [sums, block] = scratch_of<2>({r * kRankColumns, kBlockRows * kRankColumns});
    return [&, sums, block](int64_t task) {
      const int64_t col = task * kRankColumns, cols = std::min(kRankColumns, n - col);
      std::fill_n(sums, r * kRankColumns, 0.0f);
      for (int64_t row = 0; row < m; row += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, m - row);
        // A copy: rows that are a power of 2 apart would push each other out of the cache.
        if (cols < kRankColumns) std::fill_n(block, rows * kRankColumns, 0.0f);
        for (int64_t i = 0; i < rows; ++i)
          to_fp32(wide.type, place(wide, row + i, col), block + i * kRankColumns, cols);
        loops.product(narrow + row * narrow_stride, narrow_stride, block, kRankColumns, rows, r,
                      sums, true);
      }
      for (int64_t i = 0; i < r; ++i)
        for (int64_t j = 0; j < cols; ++j)
          out[i * n + col + j] = scale * sums[i * kRankColumns + j];
    };
  });
}

}  // namespace budwood::kernels
