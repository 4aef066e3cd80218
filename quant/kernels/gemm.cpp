#include <budwood/quant/kernels/bf16_choice.h>
#include <budwood/quant/kernels/gemm_job.h>
#include <budwood/quant/kernels/isa.h>

#include <cstring>

namespace budwood::quant::kernels {
namespace gemm {
namespace {

// Rows of a panel: 256 KB of the second cache, which has 2 MB where panels hold bf16 in fours.
constexpr int64_t kInner = 1024;
// A panel that is read where it lies, by few rows of x: it stays in the cache between them.
constexpr int64_t kInnerInPlace = 256;
constexpr int64_t kRowsInPlace = 24;
// Products in one chain of sums: rounding grows with its length.
constexpr int64_t kChain = 256;
// From so many rows of W on, so many panels go together.
constexpr int64_t kLongInner = 8192;
constexpr int64_t kLongPanels = 4;
// Rows of x that meet a panel before it is forgotten.
constexpr int64_t kTaskRows = 1152;
// What is decoded before it is transposed.
constexpr int64_t kScratchRows = 16;
constexpr int64_t kScratchCols = 256;

class Worker {
 public:
  explicit Worker(const Job& job) : job_(job), path_(gemm_path()) {
    const int64_t width = job.panels * kPanelWidth;
    const int64_t sizes[] = {job.inner * width / (job.bf16 != nullptr ? 2 : 1),
                             job.options.low_rank.rank * width,
                             kScratchRows * kScratchCols,
                             kScratchRows * kScratchCols / 2,
                             job.tile_rows * (job.inner + 16),
                             (job.blocks == 1 ? job.tile_rows : rows_of(job.parts)) * width,
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
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;
  ~Worker() {
    if (job_.bf16 != nullptr) {
      job_.bf16->release();
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
    return round_up(ceil_div(job_.m, std::max<int64_t>(1, parts)), job_.tile_rows);
  }

  void run(int64_t group, int64_t begin, int64_t end) {
    if (begin >= end) {
      return;
    }
    col_ = group * job_.panels * kPanelWidth;
    cols_ = std::min(job_.panels * kPanelWidth, job_.n - col_);
    const bool to_y = job_.y.type == FloatType::fp32 && cols_ % 16 == 0;
    // Sums that are complete go to y while the first cache holds them.
    const bool at_once = !to_y && job_.blocks == 1;
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
      for (int64_t row = begin; row < end; row += job_.tile_rows) {
        Tile tile;
        tile.rows = std::min(job_.tile_rows, end - row);
        set_x(row, k0, kc, tile);
        for (int64_t from = 0; from < cols_; from += kPanelWidth) {
          tile.width = std::min(kPanelWidth, round_up(cols_ - from, 16));
          if (to_y) {
            tile.c = static_cast<float*>(job_.y.data) + row * job_.y.stride + col_ + from;
            tile.c_stride = job_.y.stride;
            tile.add = block > 0 || job_.options.add;
          } else {
            tile.c_stride = job_.panels * kPanelWidth;
            tile.c = result_ + (at_once ? 0 : row - begin) * tile.c_stride + from;
            tile.add = block > 0;
          }
          const float* stored =
              read_in_place ? job_.w.floats() + k0 * job_.w.stride() + col_ + from : nullptr;
          multiply_chains(tile, kc, stored, panel_of(from));
          if (last) {
            finish(tile, row, from, bias);
          }
        }
        if (at_once) {
          store(row, row + tile.rows);
        }
      }
    }
    if (!to_y && !at_once) {
      store(begin, end);
    }
  }

  /// The rows of result_ to rows [begin, end) of y.
  void store(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      store_row(result_ + (row - begin) * job_.panels * kPanelWidth, cols_, job_.y, row, col_,
                job_.options.add);
    }
  }

  /// The tile of kc rows of a panel, or of W where it is stored, in chains.
  void multiply_chains(Tile tile, int64_t kc, const float* stored, const float* panel) {
    const int64_t pair = job_.bf16 != nullptr ? 2 : 1;
    const int64_t chain = job_.bf16 != nullptr ? job_.bf16->chain : kChain;
    const auto multiply = job_.bf16 != nullptr ? job_.bf16->tile : path_.tile;
    tile.b_stride = stored != nullptr ? job_.w.stride() : kPanelWidth;
    const auto* a = static_cast<const char*>(tile.a);
    const float* b = stored != nullptr ? stored : panel;
    for (int64_t k = 0; k == 0 || k < kc; k += chain) {
      tile.k = padded(std::min(chain, kc - k)) / pair;
      tile.a = a + k / pair * 4;
      tile.b = b + k / pair * tile.b_stride;
      multiply(tile);
      tile.add = true;
    }
  }

  /// The panel of the group's column `from`, a multiple of kPanelWidth.
  float* panel_of(int64_t from) const {
    return panel_ + from * job_.inner / (job_.bf16 != nullptr ? 2 : 1);
  }

  /// kc with the zeros that the inner loop reads behind it.
  int64_t padded(int64_t kc) const {
    return job_.bf16 != nullptr ? round_up(kc, job_.bf16->step) : kc;
  }

  /// Adds the low-rank term and the bias.
  void finish(Tile tile, int64_t row, int64_t from, const float* bias) {
    const LowRank& low = job_.options.low_rank;
    if (low.rank == 0 && bias == nullptr) {
      return;
    }
    tile.a_stride = low.left_stride;
    tile.b = low_rank_ + from * low.rank;
    tile.b_stride = kPanelWidth;
    tile.k = low.rank;
    tile.bias = bias == nullptr ? nullptr : bias + from;
    tile.add = true;
    for (const int64_t end = row + tile.rows; row < end; row += kTileRows) {
      tile.rows = std::min(kTileRows, end - row);
      tile.a = low.left + row * low.left_stride;
      path_.tile(tile);
      tile.c += kTileRows * tile.c_stride;
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
    if (job_.bf16 != nullptr) {
      tile.a = place(x, row, k0);
      tile.a_stride = x.stride / 2;
      if (x.stride % 2 != 0 || padded(kc) != kc) {
        tile.a = strip_;
        tile.a_stride = job_.inner / 2;
        auto* to = reinterpret_cast<uint16_t*>(strip_);
        for (int64_t r = 0; r < tile.rows; ++r, to += job_.inner) {
          std::memcpy(to, place(x, row + r, k0), static_cast<size_t>(kc) * 2);
          std::fill(to + kc, to + padded(kc), uint16_t{0});
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
    } else if (job_.panels == 1 && job_.bf16 == nullptr) {
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
    const int64_t pairs = ceil_div(kc, 2);
    for (int64_t from = 0; from < cols_ && padded(kc) > kc; from += kPanelWidth) {
      float* panel = panel_of(from);
      std::fill(panel + pairs * kPanelWidth, panel + padded(kc) / 2 * kPanelWidth, 0.0f);
    }
  }

  /// Rows [r, r + rows) of the group by columns [col, col + cols) of W, transposed to rows `at`,
  /// at + 1, ... of the panel.
  void fill_transposed(int64_t r, int64_t rows, int64_t col, int64_t cols, int64_t at) {
    const Matrix& w = job_.w;
    float* panel = panel_of(r / kPanelWidth * kPanelWidth) + r % kPanelWidth;
    const bool whole = rows == kScratchRows;
    if (job_.bf16 != nullptr) {
      const float* from = half_scratch_;
      int64_t stride = kScratchCols / 2;
      if (whole && w.bf16() != nullptr && w.stride() % 2 == 0 && cols % 2 == 0) {
        from = reinterpret_cast<const float*>(w.bf16() + (col_ + r) * w.stride() + col);
        stride = w.stride() / 2;
      } else {
        decode_to_scratch(col_ + r, rows, col, cols);
      }
      path_.transpose(from, stride, (cols + 1) / 2, panel + at / 2 * kPanelWidth);
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
    path_.transpose(from, stride, cols, panel + at * kPanelWidth);
  }

  /// Rows [k, k + rows) of W to rows `at`, at + 1, ... of the panels.
  void fill_rows(int64_t k, int64_t rows, int64_t at) {
    const Matrix& w = job_.w;
    const bool stored =
        job_.bf16 != nullptr && w.bf16() != nullptr && rows % 2 == 0 && cols_ % 16 == 0;
    const bool floats = job_.bf16 == nullptr && w.floats() != nullptr && cols_ % 16 == 0;
    if (!stored && !floats) {
      decode_to_scratch(k, rows, col_, cols_);
    }
    for (int64_t from = 0; from < cols_; from += kPanelWidth) {
      const int64_t width = std::min(kPanelWidth, round_up(cols_ - from, 16));
      float* panel = panel_of(from);
      if (floats) {
        w.decode(k, rows, col_ + from, width, panel + at * kPanelWidth, kPanelWidth);
        continue;
      }
      if (job_.bf16 == nullptr) {
        for (int64_t r = 0; r < rows; ++r) {
          std::copy_n(scratch_ + r * kScratchCols + from, width, panel + (at + r) * kPanelWidth);
        }
        continue;
      }
      const uint16_t* halves = stored ? w.bf16() + k * w.stride() + col_ + from
                                      : reinterpret_cast<uint16_t*>(half_scratch_) + from;
      const int64_t stride = stored ? w.stride() : kScratchCols;
      for (int64_t r = 0; r < rows; r += 2) {
        kBf16Moves.zip(halves + r * stride, halves + (r + 1) * stride, width,
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
      if (job_.bf16 != nullptr) {
        kBf16Moves.round(values, padded,
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

}  // namespace

Workspace& workspace() {
  thread_local Workspace mine;
  return mine;
}

const GemmPath& gemm_path() {
  return active_path(kGemmScalar, kGemmAvx2, kGemmAvx512);
}

void store_row(float* sums, int64_t n, const MutableFloatRows& y, int64_t row, int64_t col,
               bool add) {
  auto* to = place(y, row, col);
  constexpr int64_t kPiece = 1024;
  if (add) {
    float old[kPiece];
    for (int64_t i = 0; i < n; i += kPiece) {
      const int64_t here = std::min(n - i, kPiece);
      to_fp32(y.type, to + i * float_bytes(y.type), old, here);
      for (int64_t j = 0; j < here; ++j) {
        sums[i + j] = old[j] + sums[i + j];
      }
    }
  }
  fp32_to(y.type, sums, to, n);
}

Job::Job(const Matrix& matrix, bool transpose, const FloatRows& x_rows, int64_t rows,
         const MutableFloatRows& y_rows, const GemmOptions& how)
    : w(matrix), transposed(transpose), x(x_rows), m(rows), y(y_rows), options(how) {
  n = transposed ? w.rows() : w.cols();
  k = transposed ? w.cols() : w.rows();
  if (x.type == FloatType::bf16 && !options.exact && multiplies_in_bf16()) {
    bf16 = &bf16_path();
    tile_rows = bf16->rows;
  }
  if (!transposed) {
    panels = std::max<int64_t>(1, w.block() / kPanelWidth);
    // A long x, the gradient of logits, is read from memory for each group.
    if (k >= kLongInner) panels = std::max(panels, kLongPanels);
    in_place = bf16 == nullptr && w.floats() != nullptr && m <= kRowsInPlace;
  }
  int64_t most = in_place ? kInnerInPlace : kInner / panels, task_rows = kTaskRows / panels;
  if (bf16 != nullptr && bf16->panels > panels) {
    panels = bf16->panels;
    most = 2 * kInner;
    task_rows = kTaskRows;
  }
  blocks = std::max<int64_t>(1, ceil_div(k, most));
  inner = round_up(std::max<int64_t>(1, ceil_div(k, blocks)), 256);
  blocks = std::max<int64_t>(1, ceil_div(k, inner));
  groups = ceil_div(n, panels * kPanelWidth);
  parts = last_parts = ceil_div(m, task_rows);
  // The groups that do not go round evenly are cut into rows.
  const int64_t threads = options.threads.count;
  if (threads > 1) {
    last_groups = std::min(groups, groups % threads + (groups >= 4 * threads ? threads : 0));
    const int64_t least = in_place ? kTileRows : std::max(4 * kTileRows, tile_rows);
    last_parts = std::max(parts, std::min(ceil_div(m, least), 2 * threads));
  }
}

}  // namespace gemm

void multiply_transposed(const Matrix& w, const FloatRows& x, int64_t m, const MutableFloatRows& y,
                         const GemmOptions& options) {
  if (m < 1 || w.rows() < 1) {
    return;
  }
  const gemm::Job job(w, true, x, m, y, options);
  const bool thin = w.floats() != nullptr && w.rows() <= gemm::kThinRows;
  m <= gemm::kFewTokens || thin ? gemm::multiply_few(job) : gemm::multiply_many(job);
}

void multiply(const Matrix& w, const FloatRows& x, int64_t m, const MutableFloatRows& y,
              const GemmOptions& options) {
  if (m < 1 || w.cols() < 1) {
    return;
  }
  gemm::multiply_many(gemm::Job(w, false, x, m, y, options));
}

}  // namespace budwood::quant::kernels
