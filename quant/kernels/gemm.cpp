#include <budwood/quant/kernels/gemm.h>
#include <budwood/quant/kernels/gemm_paths.h>
#include <budwood/quant/kernels/isa.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

namespace budwood::quant::kernels {
namespace {

// Rows of a panel: 256 KB of the second cache.
constexpr int64_t kInner = 1024;
// A panel that is read where it lies, by few rows of x: it stays in the cache between them.
constexpr int64_t kInnerInPlace = 256;
constexpr int64_t kRowsInPlace = 24;
// Rows of x that meet a panel before it is forgotten.
constexpr int64_t kTaskRows = 1152;
// What is decoded before it is transposed.
constexpr int64_t kScratchRows = 16;
constexpr int64_t kScratchCols = 256;
// Up to here every row of W is multiplied as soon as it is decoded.
constexpr int64_t kFewTokens = 8;
constexpr int64_t kFewRows = 32;
constexpr int64_t kFewCols = 1024;
// Not a power of two: the rows would share their places in the first cache.
constexpr int64_t kFewStride = kFewCols + 16;
// Multiplications that are worth another thread.
constexpr int64_t kGrain = 1 << 19;

int64_t ceil_div(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}
int64_t round_up(int64_t n, int64_t to) {
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

Workspace& workspace() {
  thread_local Workspace mine;
  return mine;
}

const GemmPath& path() {
  return active_path(kGemmScalar, kGemmAvx2, kGemmAvx512);
}

/// Element (row, col) of rows of floats.
template <class Rows>
auto* place(const Rows& rows, int64_t row, int64_t col) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(rows.data)>>,
                                  const char, char>;
  return static_cast<Byte*>(rows.data) + (row * rows.stride + col) * float_bytes(rows.type);
}

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
               bool add) {
  auto* to = place(y, row, col);
  if (add) {
    float old[kFewCols];
    for (int64_t i = 0; i < n; i += kFewCols) {
      const int64_t here = std::min(n - i, kFewCols);
      to_fp32(y.type, to + i * float_bytes(y.type), old, here);
      for (int64_t j = 0; j < here; ++j) {
        sums[i + j] = old[j] + sums[i + j];
      }
    }
  }
  fp32_to(y.type, sums, to, n);
}

// --- Many rows of x ----------------------------------------------------------------------------

struct Job {
  const Matrix& w;
  bool transposed;
  const FloatRows& x;
  int64_t m;
  const MutableFloatRows& y;
  const GemmOptions& options;
  int64_t n = 0, k = 0;
  bool bf16 = false;      ///< arithmetic
  bool in_place = false;  ///< W is read where it lies
  int64_t panels = 1;     ///< side by side in a task, so that blocks of W are decoded once
  int64_t inner = 0;      ///< rows of a panel
  int64_t blocks = 0;     ///< of the inner dimension
  int64_t groups = 0;     ///< of panels
  int64_t parts = 1;      ///< of the rows of x, for the groups before last_groups
  int64_t last_groups = 0, last_parts = 1;

  Job(const Matrix& matrix, bool transpose, const FloatRows& x_rows, int64_t rows,
      const MutableFloatRows& y_rows, const GemmOptions& how)
      : w(matrix), transposed(transpose), x(x_rows), m(rows), y(y_rows), options(how) {
    n = transposed ? w.rows() : w.cols();
    k = transposed ? w.cols() : w.rows();
    bf16 = x.type == FloatType::bf16 && !options.exact && has_avx512_bf16();
    if (!transposed) {
      panels = std::max<int64_t>(1, w.block() / kPanelWidth);
      in_place = !bf16 && w.floats() != nullptr && m <= kRowsInPlace;
    }
    const int64_t most = in_place ? kInnerInPlace : kInner / panels;
    blocks = std::max<int64_t>(1, ceil_div(k, most));
    inner = round_up(std::max<int64_t>(1, ceil_div(k, blocks)), 256);
    blocks = std::max<int64_t>(1, ceil_div(k, inner));
    groups = ceil_div(n, panels * kPanelWidth);
    parts = last_parts = ceil_div(m, kTaskRows / panels);
    // The groups that do not go round evenly are cut into rows.
    const int64_t threads = options.threads.count;
    if (threads > 1) {
      last_groups = std::min(groups, groups % threads + (groups >= 4 * threads ? threads : 0));
      const int64_t least = in_place ? kTileRows : 4 * kTileRows;
      last_parts = std::max(parts, std::min(ceil_div(m, least), 2 * threads));
    }
  }

  int64_t tasks() const { return (groups - last_groups) * parts + last_groups * last_parts; }
};

class Worker {
 public:
  explicit Worker(const Job& job) : job_(job), path_(path()) {
    const int64_t width = job.panels * kPanelWidth;
    const int64_t sizes[] = {job.inner * width,
                             job.options.low_rank.rank * width,
                             kScratchRows * kScratchCols,
                             kScratchRows * kScratchCols / 2,
                             kTileRows * (job.inner + 16),
                             round_up(rows_of(job.parts), kTileRows) * width,
                             width};
    int64_t total = 0;
    for (const int64_t size : sizes) {
      total += round_up(size, 16);
    }
    float** const parts[] = {&panel_, &low_rank_, &scratch_, &half_scratch_,
                             &strip_, &result_,   &bias_};
    float* at = workspace().floats(total);
    for (size_t i = 0; i < std::size(sizes); ++i) {
      *parts[i] = at;
      at += round_up(sizes[i], 16);
    }
  }

  void operator()(int64_t task) {
    const int64_t whole = (job_.groups - job_.last_groups) * job_.parts;
    const bool last = task >= whole;
    const int64_t parts = last ? job_.last_parts : job_.parts;
    const int64_t group =
        last ? job_.groups - job_.last_groups + (task - whole) / parts : task / parts;
    const int64_t rows = rows_of(parts);
    const int64_t begin = (last ? task - whole : task) % parts * rows;
    run(group, begin, std::min(job_.m, begin + rows));
  }

 private:
  int64_t rows_of(int64_t parts) const {
    return round_up(ceil_div(job_.m, std::max<int64_t>(1, parts)), kTileRows);
  }

  void run(int64_t group, int64_t begin, int64_t end) {
    if (begin >= end) {
      return;
    }
    col_ = group * job_.panels * kPanelWidth;
    cols_ = std::min(job_.panels * kPanelWidth, job_.n - col_);
    const bool to_y = job_.y.type == FloatType::fp32 && cols_ % 16 == 0;
    const float* bias = bias_of_group();
    for (int64_t block = 0; block < job_.blocks; ++block) {
      const int64_t k0 = block * job_.inner;
      const int64_t kc = std::min(job_.inner, job_.k - k0);
      const bool last = block + 1 == job_.blocks;
      const bool read_in_place = job_.in_place && cols_ % 16 == 0;
      // One block of one group may serve several tasks in a row.
      if (job_.blocks > 1 || held_ != group) {
        if (!read_in_place) {
          fill(k0, kc);
        }
        if (last) {
          fill_low_rank();
        }
        held_ = group;
      }
      for (int64_t row = begin; row < end; row += kTileRows) {
        Tile tile;
        tile.rows = std::min(kTileRows, end - row);
        tile.k = job_.bf16 ? (kc + 1) / 2 : kc;
        set_x(row, k0, kc, tile);
        for (int64_t p = 0; p * kPanelWidth < cols_; ++p) {
          const int64_t from = p * kPanelWidth;
          tile.width = std::min(kPanelWidth, round_up(cols_ - from, 16));
          tile.b = panel_ + p * job_.inner * kPanelWidth;
          tile.b_stride = kPanelWidth;
          if (read_in_place) {
            tile.b = job_.w.floats() + k0 * job_.w.stride() + col_ + from;
            tile.b_stride = job_.w.stride();
          }
          if (last) {
            const auto& low = job_.options.low_rank;
            tile.k2 = low.rank;
            tile.a2 = low.left + row * low.left_stride;
            tile.a2_stride = low.left_stride;
            tile.b2 = low_rank_ + p * low.rank * kPanelWidth;
            tile.bias = bias == nullptr ? nullptr : bias + from;
          }
          if (to_y) {
            tile.c = static_cast<float*>(job_.y.data) + row * job_.y.stride + col_ + from;
            tile.c_stride = job_.y.stride;
            tile.add = block > 0 || job_.options.add;
          } else {
            tile.c_stride = job_.panels * kPanelWidth;
            tile.c = result_ + (row - begin) * tile.c_stride + from;
            tile.add = block > 0;
          }
          job_.bf16 ? kGemmBf16.tile(tile) : path_.tile(tile);
        }
      }
    }
    if (!to_y) {
      for (int64_t row = begin; row < end; ++row) {
        store_row(result_ + (row - begin) * job_.panels * kPanelWidth, cols_, job_.y, row, col_,
                  job_.options.add);
      }
    }
  }

  const float* bias_of_group() {
    const float* bias = job_.options.bias;
    if (bias == nullptr || cols_ % 16 == 0) {
      return bias == nullptr ? nullptr : bias + col_;
    }
    std::copy_n(bias + col_, cols_, bias_);
    std::fill(bias_ + cols_, bias_ + round_up(cols_, 16), 0.0f);
    return bias_;
  }

  /// The rows of x where they lie, or a copy that the inner loop can read.
  void set_x(int64_t row, int64_t k0, int64_t kc, Tile& tile) {
    const FloatRows& x = job_.x;
    if (job_.bf16) {
      tile.a = place(x, row, k0);
      tile.a_stride = x.stride / 2;
      if (x.stride % 2 != 0 || kc % 2 != 0) {
        tile.a = strip_;
        tile.a_stride = job_.inner / 2;
        auto* to = reinterpret_cast<uint16_t*>(strip_);
        for (int64_t r = 0; r < tile.rows; ++r, to += job_.inner) {
          std::memcpy(to, place(x, row + r, k0), static_cast<size_t>(kc) * 2);
          to[kc] = 0;  // the strip has room beyond its last row
        }
      }
    } else if (x.type == FloatType::fp32) {
      tile.a = place(x, row, k0);
      tile.a_stride = x.stride;
    } else {
      tile.a = strip_;
      tile.a_stride = job_.inner + 16;
      for (int64_t r = 0; r < tile.rows; ++r) {
        to_fp32(x.type, place(x, row + r, k0), strip_ + r * tile.a_stride, kc);
      }
    }
  }

  void fill(int64_t k0, int64_t kc) {
    if (job_.transposed) {
      for (int64_t r = 0; r < cols_; r += kScratchRows) {
        const int64_t rows = std::min(kScratchRows, cols_ - r);
        for (int64_t c = 0; c < kc; c += kScratchCols) {
          fill_transposed(r, rows, k0 + c, std::min(kScratchCols, kc - c), c);
        }
      }
    } else if (job_.panels == 1 && !job_.bf16) {
      job_.w.decode(k0, kc, col_, cols_, panel_, kPanelWidth);
      for (int64_t k = 0; k < kc && cols_ % 16 != 0; ++k) {
        float* row = panel_ + k * kPanelWidth;
        std::fill(row + cols_, row + round_up(cols_, 16), 0.0f);
      }
    } else {
      for (int64_t k = 0; k < kc; k += kScratchRows) {
        fill_rows(k0 + k, std::min(kScratchRows, kc - k), k);
      }
    }
  }

  /// Rows [r, r + rows) of the group by columns [col, col + cols) of W, transposed to rows `at`,
  /// at + 1, ... of the panel.
  void fill_transposed(int64_t r, int64_t rows, int64_t col, int64_t cols, int64_t at) {
    const Matrix& w = job_.w;
    const bool whole = rows == kScratchRows;
    if (job_.bf16) {
      const float* from = half_scratch_;
      int64_t stride = kScratchCols / 2;
      if (whole && w.bf16() != nullptr && w.stride() % 2 == 0 && cols % 2 == 0) {
        from = reinterpret_cast<const float*>(w.bf16() + (col_ + r) * w.stride() + col);
        stride = w.stride() / 2;
      } else {
        decode_to_scratch(col_ + r, rows, col, cols);
      }
      path_.transpose(from, stride, (cols + 1) / 2, panel_ + at / 2 * kPanelWidth + r);
      return;
    }
    const float* from = scratch_;
    int64_t stride = kScratchCols;
    if (whole && w.floats() != nullptr) {
      from = w.floats() + (col_ + r) * w.stride() + col;
      stride = w.stride();
    } else {
      decode_to_scratch(col_ + r, rows, col, cols);
    }
    path_.transpose(from, stride, cols, panel_ + at * kPanelWidth + r);
  }

  /// Rows [k, k + rows) of W to rows `at`, at + 1, ... of the panels.
  void fill_rows(int64_t k, int64_t rows, int64_t at) {
    const Matrix& w = job_.w;
    const bool stored = job_.bf16 && w.bf16() != nullptr && rows % 2 == 0 && cols_ % 16 == 0;
    if (!stored) {
      decode_to_scratch(k, rows, col_, cols_);
    }
    for (int64_t from = 0; from < cols_; from += kPanelWidth) {
      const int64_t width = std::min(kPanelWidth, round_up(cols_ - from, 16));
      float* panel = panel_ + from * job_.inner;
      if (!job_.bf16) {
        for (int64_t r = 0; r < rows; ++r) {
          std::copy_n(scratch_ + r * kScratchCols + from, width, panel + (at + r) * kPanelWidth);
        }
        continue;
      }
      const uint16_t* halves = stored ? w.bf16() + k * w.stride() + col_ + from
                                      : reinterpret_cast<uint16_t*>(half_scratch_) + from;
      const int64_t stride = stored ? w.stride() : kScratchCols;
      for (int64_t r = 0; r < rows; r += 2) {
        kGemmBf16.zip(halves + r * stride, halves + (r + 1) * stride, width,
                      reinterpret_cast<uint16_t*>(panel + (at + r) / 2 * kPanelWidth));
      }
    }
  }

  /// A piece of W to scratch_, with zeros below and to the right as far as vectors read; for bf16
  /// arithmetic also to half_scratch_.
  void decode_to_scratch(int64_t row, int64_t rows, int64_t col, int64_t cols) {
    job_.w.decode(row, rows, col, cols, scratch_, kScratchCols);
    const int64_t padded = round_up(cols, 16);
    for (int64_t r = 0; r < kScratchRows; ++r) {
      float* values = scratch_ + r * kScratchCols;
      std::fill(values + (r < rows ? cols : 0), values + padded, 0.0f);
      if (job_.bf16) {
        kGemmBf16.round(values, padded,
                        reinterpret_cast<uint16_t*>(half_scratch_) + r * kScratchCols);
      }
    }
  }

  void fill_low_rank() {
    const LowRank& low = job_.options.low_rank;
    for (int64_t from = 0; from < cols_ && low.rank > 0; from += kPanelWidth) {
      float* panel = low_rank_ + from * low.rank;
      for (int64_t c = 0; c < kPanelWidth; c += 16) {
        const int64_t count = std::clamp<int64_t>(cols_ - from - c, 0, 16);
        const float* right = low.right + (col_ + from + c) * low.right_column_stride;
        if (count == 16 && low.right_rank_stride == 1) {
          path_.transpose(right, low.right_column_stride, low.rank, panel + c);
        } else {
          for (int64_t i = 0; i < low.rank; ++i) {
            for (int64_t j = 0; j < 16; ++j) {
              panel[i * kPanelWidth + c + j] =
                  j < count ? right[i * low.right_rank_stride + j * low.right_column_stride] : 0.0f;
            }
          }
        }
      }
      for (int64_t i = 0; i < low.rank * kPanelWidth; ++i) {
        panel[i] *= low.scale;
      }
    }
  }

  const Job& job_;
  const GemmPath& path_;
  float *panel_, *low_rank_, *scratch_, *half_scratch_, *strip_, *result_, *bias_;
  int64_t col_ = 0, cols_ = 0;  ///< of the group
  int64_t held_ = -1;           ///< the group whose panels are filled
};

void multiply_many(const Job& job) {
  hand_out(job.options.threads, job.tasks(), job.n * job.k * job.m, [&] { return Worker(job); });
}

// --- Few rows of x ------------------------------------------------------------------------------

class FewWorker {
 public:
  FewWorker(const Job& job, const float* x, int64_t x_stride)
      : job_(job), path_(path()), x_(x), x_stride_(x_stride) {}

  void operator()(int64_t task) {
    const int64_t begin = task * kFewRows, end = std::min(job_.n, begin + kFewRows);
    for (int64_t row = begin; row < end; row += kDotRows) {
      const int64_t rows = std::min(kDotRows, end - row);
      float* sums = sums_ + (row - begin);
      for (int64_t t = 0; t < job_.m; ++t) {
        std::fill_n(sums + t * kFewRows, rows, 0.0f);
      }
      for (int64_t col = 0; col < job_.k; col += kFewCols) {
        const int64_t cols = std::min(kFewCols, job_.k - col);
        float found[kDotRows];
        if (job_.m == 1 && rows == kDotRows && job_.w.dot(row, col, cols, x_ + col, found)) {
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
    for (int64_t t = 0; t < job_.m; ++t) {
      float* sums = sums_ + t * kFewRows;
      for (int64_t i = 0; i < end - begin && job_.options.bias != nullptr; ++i) {
        sums[i] += job_.options.bias[begin + i];
      }
      store_row(sums, end - begin, job_.y, t, begin, job_.options.add);
    }
  }

 private:
  void add(const float* w, int64_t w_stride, int64_t rows, const float* x, int64_t x_stride,
           int64_t n, float scale, float* sums) {
    float found[kDotRows * kDotRows];
    for (int64_t t = 0; t < job_.m; t += kDotRows) {
      const int64_t tokens = std::min(kDotRows, job_.m - t);
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
      add(right, stride, rows, low.left + k, low.left_stride, n, low.scale, sums);
    }
  }

  const Job& job_;
  const GemmPath& path_;
  const float* x_;
  int64_t x_stride_;
  alignas(64) float piece_[kDotRows * kFewStride];
  alignas(64) float sums_[kFewTokens * kFewRows];
};

void multiply_few(const Job& job) {
  const auto* x = static_cast<const float*>(job.x.data);
  int64_t stride = job.x.stride;
  if (job.x.type != FloatType::fp32) {
    stride = job.k;
    float* copy = workspace().floats(job.m * stride);
    for (int64_t t = 0; t < job.m; ++t) {
      to_fp32(job.x.type, place(job.x, t, 0), copy + t * stride, job.k);
    }
    x = copy;
  }
  hand_out(job.options.threads, ceil_div(job.n, kFewRows), job.n * job.k * kFewTokens,
           [&] { return FewWorker(job, x, stride); });
}

}  // namespace

void multiply_transposed(const Matrix& w, const FloatRows& x, int64_t m, const MutableFloatRows& y,
                         const GemmOptions& options) {
  if (m < 1 || w.rows() < 1) {
    return;
  }
  const Job job(w, true, x, m, y, options);
  m <= kFewTokens ? multiply_few(job) : multiply_many(job);
}

void multiply(const Matrix& w, const FloatRows& x, int64_t m, const MutableFloatRows& y,
              const GemmOptions& options) {
  if (m < 1 || w.cols() < 1) {
    return;
  }
  multiply_many(Job(w, false, x, m, y, options));
}

}  // namespace budwood::quant::kernels
