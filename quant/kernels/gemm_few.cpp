#include <budwood/quant/kernels/gemm_job.h>

namespace budwood::quant::kernels::gemm {
namespace {

// Rows of W in a task, and columns that are decoded at once.
constexpr int64_t kFewRows = 32;
constexpr int64_t kFewCols = 1024;
// Not a power of two: the rows would share their places in the first cache.
constexpr int64_t kFewStride = kFewCols + 16;

class FewWorker {
 public:
  explicit FewWorker(const Job& job) : job_(job), path_(gemm_path()) {}

  void operator()(int64_t task) {
    const int64_t pieces = ceil_div(job_.n, kFewRows);
    hold(task / pieces * kFewTokens);
    const int64_t begin = task % pieces * kFewRows, end = std::min(job_.n, begin + kFewRows);
    for (int64_t row = begin; row < end; row += kDotRows) {
      const int64_t rows = std::min(kDotRows, end - row);
      float* sums = sums_ + (row - begin);
      for (int64_t t = 0; t < tokens_; ++t) {
        std::fill_n(sums + t * kFewRows, rows, 0.0f);
      }
      for (int64_t col = 0; col < job_.k; col += kFewCols) {
        const int64_t cols = std::min(kFewCols, job_.k - col);
        float found[kDotRows];
        if (tokens_ == 1 && rows == kDotRows && job_.w.dot(row, col, cols, x_ + col, found)) {
          for (int64_t r = 0; r < rows; ++r) {
            sums[r] += found[r];
          }
        } else if (job_.w.floats() != nullptr) {
          add(job_.w.floats() + row * job_.w.stride() + col, job_.w.stride(), rows, x_ + col,
              x_stride_, cols, 1.0f, sums);
        } else {
          job_.w.decode(row, rows, col, cols, piece_, kFewStride);
          add(piece_, kFewStride, rows, x_ + col, x_stride_, cols, 1.0f, sums);
        }
      }
      add_low_rank(row, rows, sums);
    }
    for (int64_t t = 0; t < tokens_; ++t) {
      float* sums = sums_ + t * kFewRows;
      for (int64_t i = 0; i < end - begin && job_.options.bias != nullptr; ++i) {
        sums[i] += job_.options.bias[begin + i];
      }
      store_row(sums, end - begin, job_.y, first_ + t, begin, job_.options.add);
    }
  }

 private:
  /// Takes up to kFewTokens rows of x as fp32.
  void hold(int64_t first) {
    if (first == first_) {
      return;
    }
    first_ = first;
    tokens_ = std::min(kFewTokens, job_.m - first);
    if (job_.x.type == FloatType::fp32) {
      x_ = static_cast<const float*>(job_.x.data) + first * job_.x.stride;
      x_stride_ = job_.x.stride;
      return;
    }
    x_stride_ = round_up(job_.k, 16);
    float* copy = workspace().floats(kFewTokens * x_stride_);
    for (int64_t t = 0; t < tokens_; ++t) {
      to_fp32(job_.x.type, place(job_.x, first + t, 0), copy + t * x_stride_, job_.k);
    }
    x_ = copy;
  }

  void add(const float* w, int64_t w_stride, int64_t rows, const float* x, int64_t x_stride,
           int64_t n, float scale, float* sums) {
    float found[kDotRows * kDotRows];
    for (int64_t t = 0; t < tokens_; t += kDotRows) {
      const int64_t tokens = std::min(kDotRows, tokens_ - t);
      path_.dot(w, w_stride, rows, x + t * x_stride, x_stride, tokens, n, found);
      for (int64_t i = 0; i < tokens; ++i) {
        for (int64_t r = 0; r < rows; ++r) {
          sums[(t + i) * kFewRows + r] += scale * found[r * kDotRows + i];
        }
      }
    }
  }

  void add_low_rank(int64_t row, int64_t rows, float* sums) {
    const LowRank& low = job_.options.low_rank;
    for (int64_t k = 0; k < low.rank; k += kFewCols) {
      const int64_t n = std::min(kFewCols, low.rank - k);
      const float* right = low.right + row * low.right_column_stride + k * low.right_rank_stride;
      int64_t stride = low.right_column_stride;
      if (low.right_rank_stride != 1) {
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = 0; i < n; ++i) {
            piece_[r * kFewStride + i] =
                right[r * low.right_column_stride + i * low.right_rank_stride];
          }
        }
        right = piece_;
        stride = kFewStride;
      }
      add(right, stride, rows, low.left + first_ * low.left_stride + k, low.left_stride, n,
          low.scale, sums);
    }
  }

  const Job& job_;
  const GemmPath& path_;
  int64_t first_ = -1, tokens_ = 0;  ///< of the rows of x that are held
  const float* x_ = nullptr;
  int64_t x_stride_ = 0;
  alignas(64) float piece_[kDotRows * kFewStride];
  alignas(64) float sums_[kFewTokens * kFewRows];
};

}  // namespace

void multiply_few(const Job& job) {
  hand_out(job.options.threads, ceil_div(job.n, kFewRows) * ceil_div(job.m, kFewTokens),
           job.n * job.k * std::max(job.m, kFewTokens), [&] { return FewWorker(job); });
}

}  // namespace budwood::quant::kernels::gemm
