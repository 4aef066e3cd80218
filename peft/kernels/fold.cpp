#include <budwood/peft/kernels/fold.h>
#include <budwood/peft/kernels/fold_paths.h>
#include <budwood/quant/kernels/isa.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

namespace budwood::kernels {
namespace {

const FoldPath& path() {
  return quant::kernels::active_path(kFoldScalar, kFoldAvx2, kFoldAvx512);
}

bool round_fp16(const double* src, uint16_t* dst, int64_t n) {
  constexpr int64_t kPiece = 256;
  float piece[kPiece];
  bool finite = true;
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t count = std::min(kPiece, n - i);
    path().round_to_odd(src + i, piece, count);
    quant::kernels::fp32_to_fp16(piece, dst + i, count);
    for (int64_t j = i; j < i + count; ++j) finite &= (dst[j] & 0x7c00u) != 0x7c00u;
  }
  return finite;
}

}  // namespace

void widen(FloatType type, const void* src, double* dst, int64_t n) {
  switch (type) {
    case FloatType::fp32:
      return path().fp32_to_fp64(static_cast<const float*>(src), dst, n);
    case FloatType::bf16:
      return path().bf16_to_fp64(static_cast<const uint16_t*>(src), dst, n);
    case FloatType::fp16:
      break;
  }
  const auto* halves = static_cast<const uint16_t*>(src);
  constexpr int64_t kPiece = 256;
  float piece[kPiece];
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t count = std::min(kPiece, n - i);
    quant::kernels::fp16_to_fp32(halves + i, piece, count);
    path().fp32_to_fp64(piece, dst + i, count);
  }
}

bool round_once(const double* src, FloatType type, void* dst, int64_t n) {
  switch (type) {
    case FloatType::fp32:
      return path().round_fp32(src, static_cast<float*>(dst), n);
    case FloatType::bf16:
      return path().round_bf16(src, static_cast<uint16_t*>(dst), n);
    case FloatType::fp16:
      break;
  }
  return round_fp16(src, static_cast<uint16_t*>(dst), n);
}

void add_product(double* panel, int64_t rows, int64_t cols, Factor left, Factor right,
                 int64_t rank) {
  const auto ranks = static_cast<size_t>(rank);
  std::vector<double> block(ranks * kFoldColumns), factors(static_cast<size_t>(rows) * ranks);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < rank; ++k)
      factors[static_cast<size_t>(i * rank + k)] =
          left.scale * left.data[i * left.stride + k * left.rank_stride];
  for (int64_t begin = 0; begin < cols; begin += kFoldColumns) {
    const int64_t count = std::min(kFoldColumns, cols - begin);
    for (int64_t k = 0; k < rank; ++k) {
      double* to = block.data() + k * kFoldColumns;
      const float* from = right.data + begin * right.stride + k * right.rank_stride;
      if (right.stride == 1 && right.scale == 1.0)
        path().fp32_to_fp64(from, to, count);
      else
        for (int64_t j = 0; j < count; ++j) to[j] = right.scale * from[j * right.stride];
    }
    const int64_t whole = count / 8 * 8;
    path().add_rows(panel + begin, cols, rows, whole, factors.data(), block.data(), rank);
    for (int64_t i = 0; i < rows; ++i) {
      double* sums = panel + i * cols + begin;
      const double* own = factors.data() + i * rank;
      for (int64_t j = whole; j < count; ++j) {
        double sum = sums[j];
        for (int64_t k = 0; k < rank; ++k)
          sum = std::fma(own[k], block[static_cast<size_t>(k * kFoldColumns + j)], sum);
        sums[j] = sum;
      }
    }
  }
}

void FoldSums::add(const FoldSums& other) {
  weight += other.weight;
  delta += other.delta;
  left += other.left;
  error += other.error;
}

FoldSums sums_of(const double* before, const double* after, const double* written, int64_t n) {
  double chains[4][kFoldChains] = {};
  const int64_t whole = n / kFoldChains * kFoldChains;
  path().add_sums(before, after, written, whole, chains);
  for (int64_t i = whole; i < n; ++i) {
    const int64_t j = i - whole;
    const double change = after[i] - before[i], missed = written[i] - after[i];
    chains[0][j] += before[i] * before[i];
    chains[1][j] += change * change;
    chains[2][j] += (written[i] - before[i]) * change;
    chains[3][j] += missed * missed;
  }
  FoldSums sums;
  for (int64_t j = 0; j < kFoldChains; ++j)
    sums.add({chains[0][j], chains[1][j], chains[2][j], chains[3][j]});
  return sums;
}

bool round_and_sum(FloatType stored, const void* before, const double* after, FloatType type,
                   void* dst, int64_t n, FoldSums& sums) {
  constexpr int64_t kPiece = 512;
  double old[kPiece], written[kPiece];
  bool finite = true;
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t count = std::min(kPiece, n - i);
    const auto* from =
        static_cast<const std::byte*>(before) + i * quant::kernels::float_bytes(stored);
    auto* to = static_cast<std::byte*>(dst) + i * quant::kernels::float_bytes(type);
    finite &= round_once(after + i, type, to, count);
    widen(type, to, written, count);
    widen(stored, from, old, count);
    sums.add(sums_of(old, after + i, written, count));
  }
  return finite;
}

void add_column_squares(const double* panel, int64_t rows, int64_t cols, double* sums) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) sums[j] += panel[i * cols + j] * panel[i * cols + j];
}

double sum_of_squares(const double* values, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += values[i] * values[i];
  return sum;
}

}  // namespace budwood::kernels
