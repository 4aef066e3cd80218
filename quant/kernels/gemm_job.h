#pragma once

#include <budwood/quant/kernels/gemm.h>
#include <budwood/quant/kernels/gemm_paths.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <type_traits>

/// What the products with many and with few rows of x share.
namespace budwood::quant::kernels::gemm {

/// Up to here every row of W is multiplied as soon as it is decoded.
constexpr int64_t kFewTokens = 8;
/// A stored fp32 W of so few rows is multiplied with kFewTokens rows of x after the other.
constexpr int64_t kThinRows = 32;

inline int64_t ceil_div(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}
inline int64_t round_up(int64_t n, int64_t to) {
  return ceil_div(n, to) * to;
}

/// Grows, and stays for the thread's next product.
class Workspace {
 public:
  float* floats(int64_t n) {
    if (n > size_) {
      size_ = round_up(n, 1024);
      data_.reset();
      data_.reset(static_cast<float*>(
          std::aligned_alloc(4096, static_cast<size_t>(size_) * sizeof(float))));
      if (data_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

/// The calling thread's.
Workspace& workspace();

/// The inner loops in use.
const GemmPath& gemm_path();

/// Element (row, col) of rows of floats.
template <class Rows>
auto* place(const Rows& rows, int64_t row, int64_t col) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(rows.data)>>,
                                  const char, char>;
  return static_cast<Byte*>(rows.data) + (row * rows.stride + col) * float_bytes(rows.type);
}

/// Multiplications that are worth another thread.
constexpr int64_t kGrain = 1 << 19;

/// Calls task(i) for i in [0, tasks), handed out one by one to as many threads as the work is
/// worth.
template <class MakeWorker>
void hand_out(const Threads& threads, int64_t tasks, int64_t work, const MakeWorker& make_worker) {
  const int64_t worth = std::min({int64_t{threads.count}, tasks, 1 + work / kGrain});
  std::atomic<int64_t> next = 0;
  const std::function<void(int)> body = [&](int) {
    auto worker = make_worker();
    for (int64_t i = next++; i < tasks; i = next++) {
      worker(i);
    }
  };
  if (worth > 1 && threads.run) {
    threads.run(static_cast<int>(worth), body);
  } else {
    body(0);
  }
}

/// One row of sums to y.
void store_row(float* sums, int64_t n, const MutableFloatRows& y, int64_t row, int64_t col,
               bool add);

/// One product and how it is cut.
struct Job {
  const Matrix& w;
  bool transposed;
  const FloatRows& x;
  int64_t m;
  const MutableFloatRows& y;
  const GemmOptions& options;
  int64_t n = 0, k = 0;
  const Bf16Path* bf16 = nullptr;  ///< arithmetic; null for fp32
  int64_t tile_rows = kTileRows;
  bool in_place = false;  ///< W is read where it lies
  int64_t panels = 1;     ///< side by side in a task, so that blocks of W are decoded once
  int64_t inner = 0;      ///< rows of a panel
  int64_t blocks = 0;     ///< of the inner dimension
  int64_t groups = 0;     ///< of panels
  int64_t parts = 1;      ///< of the rows of x, for the groups before last_groups
  int64_t last_groups = 0, last_parts = 1;

  Job(const Matrix& w, bool transposed, const FloatRows& x, int64_t m, const MutableFloatRows& y,
      const GemmOptions& options);
  int64_t tasks() const { return (groups - last_groups) * parts + last_groups * last_parts; }
};

/// y = x Wᵀ for few rows of x, or of W.
void multiply_few(const Job& job);

}  // namespace budwood::quant::kernels::gemm
