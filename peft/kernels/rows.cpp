#include <budwood/peft/kernels/rows_paths.h>
#include <budwood/peft/kernels/scratch.h>
#include <budwood/quant/kernels/isa.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace budwood::kernels {
namespace {

using quant::kernels::fp32_to;
using quant::kernels::to_fp32;
using quant::kernels::gemm::ceil_div;
using quant::kernels::gemm::hand_out;
using quant::kernels::gemm::place;

// Rows that a thread takes at a time, and whose sums over rows are one partial sum.
constexpr int64_t kRows = 16;

const RowsPath& path() {
  return quant::kernels::active_path(kRowsScalar, kRowsAvx2, kRowsAvx512);
}

// A row as floats, in `buffer` where it is not stored so.
const float* row_of(const FloatRows& rows, int64_t row, int64_t n, float* buffer) {
  const void* src = place(rows, row, 0);
  if (rows.type == FloatType::fp32) return static_cast<const float*>(src);
  to_fp32(rows.type, src, buffer, n);
  return buffer;
}

// Where a row of results is computed, and its way to its place.
float* target_of(const MutableFloatRows& rows, int64_t row, float* buffer) {
  void* stored = place(rows, row, 0);
  return rows.type == FloatType::fp32 ? static_cast<float*>(stored) : buffer;
}
void finish(const MutableFloatRows& rows, int64_t row, int64_t n, const float* target) {
  if (rows.type != FloatType::fp32) fp32_to(rows.type, target, place(rows, row, 0), n);
}

// body(row, buffers) for every row; `work` is in operations for each element.
template <size_t count, class Body>
void for_rows(int64_t m, int64_t n, int64_t work, const Threads& threads, const Body& body) {
  hand_out(threads, ceil_div(m, kRows), m * n * work, [&] {
    std::array<int64_t, count> sizes;
    sizes.fill(n);
    const auto buffers = scratch_of(sizes);
    return [&, buffers](int64_t task) {
      const int64_t end = std::min(m, (task + 1) * kRows);
      for (int64_t row = task * kRows; row < end; ++row) body(row, buffers);
    };
  });
}

// Sums over rows: each task's in a row of its own, added up in their order.
class RowSums {
 public:
  RowSums(float* total, int64_t m, int64_t n)
      : total_(total), n_(n), parts_(total == nullptr ? 0 : ceil_div(m, kRows) * n) {}
  float* of_row(int64_t row) { return parts_.data() + row / kRows * n_; }
  ~RowSums() {
    if (total_ == nullptr) return;
    for (int64_t i = 0; i < n_; ++i) {
      double sum = 0;
      for (size_t at = static_cast<size_t>(i); at < parts_.size(); at += static_cast<size_t>(n_))
        sum += static_cast<double>(parts_[at]);
      total_[i] = static_cast<float>(sum);
    }
  }
  RowSums(const RowSums&) = delete;
  RowSums& operator=(const RowSums&) = delete;

 private:
  float* total_;
  int64_t n_;
  std::vector<float> parts_;
};

float reciprocal_root(float mean_square, float eps) {
  return 1.0f / std::sqrt(mean_square + eps);
}

}  // namespace

void rms_norm(const FloatRows& x, int64_t m, int64_t n, const float* weight, float eps,
              const MutableFloatRows& y, const Threads& threads) {
  const RowsPath& loops = path();
  for_rows<2>(m, n, 1, threads, [&](int64_t row, const std::array<float*, 2>& buffers) {
    const float* a = row_of(x, row, n, buffers[0]);
    float* to = target_of(y, row, buffers[1]);
    const float scale = reciprocal_root(loops.dot(a, a, n) / static_cast<float>(n), eps);
    loops.affine(a, 0.0f, scale, n, to);
    if (x.type != FloatType::fp32 && y.type == x.type) {
      finish(y, row, n, to);
      to_fp32(y.type, place(y, row, 0), to, n);
    }
    loops.times(to, weight, nullptr, n, to);
    finish(y, row, n, to);
  });
}

void rms_norm_backward(const FloatRows& grad, const FloatRows& x, int64_t m, int64_t n,
                       const float* weight, float eps, const MutableFloatRows& dx, float* dweight,
                       const Threads& threads) {
  const RowsPath& loops = path();
  RowSums sums(dweight, m, n);
  for_rows<4>(m, n, 2, threads, [&](int64_t row, const std::array<float*, 4>& buffers) {
    const float* dy = row_of(grad, row, n, buffers[0]);
    const float* a = row_of(x, row, n, buffers[1]);
    float* weighted = buffers[2];
    const float mean_square = loops.dot(a, a, n) / static_cast<float>(n);
    const float scale = reciprocal_root(mean_square, eps);
    if (dweight != nullptr) {
      loops.affine(a, 0.0f, scale, n, weighted);
      loops.times(dy, weighted, nullptr, n, weighted);
      loops.add(weighted, n, sums.of_row(row));
    }
    loops.times(dy, weight, nullptr, n, weighted);
    const float pull = loops.dot(weighted, a, n) / static_cast<float>(n) * scale * scale * scale;
    float* to = target_of(dx, row, buffers[3]);
    loops.combine(weighted, scale, a, pull, 0.0f, n, to);
    finish(dx, row, n, to);
  });
}

void layer_norm(const FloatRows& x, int64_t m, int64_t n, const float* weight, const float* bias,
                float eps, const MutableFloatRows& y, const Threads& threads) {
  const RowsPath& loops = path();
  for_rows<2>(m, n, 2, threads, [&](int64_t row, const std::array<float*, 2>& buffers) {
    const float* a = row_of(x, row, n, buffers[0]);
    float* to = target_of(y, row, buffers[1]);
    const float mean = loops.sum(a, n) / static_cast<float>(n);
    const float scale =
        reciprocal_root(loops.square_deviation(a, mean, n) / static_cast<float>(n), eps);
    loops.affine(a, mean, scale, n, to);
    loops.times(to, weight, bias, n, to);
    finish(y, row, n, to);
  });
}

void layer_norm_backward(const FloatRows& grad, const FloatRows& x, int64_t m, int64_t n,
                         const float* weight, float eps, const MutableFloatRows& dx, float* dweight,
                         float* dbias, const Threads& threads) {
  const RowsPath& loops = path();
  RowSums weight_sums(dweight, m, n), bias_sums(dbias, m, n);
  for_rows<5>(m, n, 3, threads, [&](int64_t row, const std::array<float*, 5>& buffers) {
    const float* dy = row_of(grad, row, n, buffers[0]);
    const float* a = row_of(x, row, n, buffers[1]);
    float *normed = buffers[2], *weighted = buffers[3];
    const float count = static_cast<float>(n);
    const float mean = loops.sum(a, n) / count;
    const float scale = reciprocal_root(loops.square_deviation(a, mean, n) / count, eps);
    loops.affine(a, mean, scale, n, normed);
    if (dweight != nullptr) {
      loops.times(dy, normed, nullptr, n, weighted);
      loops.add(weighted, n, weight_sums.of_row(row));
      loops.add(dy, n, bias_sums.of_row(row));
    }
    loops.times(dy, weight, nullptr, n, weighted);
    const float pull = loops.dot(weighted, normed, n) / count * scale;
    const float shift = loops.sum(weighted, n) / count * scale;
    float* to = target_of(dx, row, buffers[4]);
    loops.combine(weighted, scale, normed, pull, shift, n, to);
    finish(dx, row, n, to);
  });
}

void sum_products(const FloatRows& a, const FloatRows& b, int64_t m, int64_t n, float* sums,
                  const Threads& threads) {
  const RowsPath& loops = path();
  RowSums all(sums, m, n);
  for_rows<3>(m, n, 1, threads, [&](int64_t row, const std::array<float*, 3>& buffers) {
    loops.times(row_of(a, row, n, buffers[0]), row_of(b, row, n, buffers[1]), nullptr, n,
                buffers[2]);
    loops.add(buffers[2], n, all.of_row(row));
  });
}

void gated(Gate gate, const FloatRows& g, const FloatRows& u, int64_t m, int64_t n,
           const MutableFloatRows& y, const Threads& threads) {
  const RowsPath& loops = path();
  for_rows<3>(m, n, 4, threads, [&](int64_t row, const std::array<float*, 3>& buffers) {
    float* to = target_of(y, row, buffers[2]);
    loops.gated(gate, row_of(g, row, n, buffers[0]), row_of(u, row, n, buffers[1]), n, to);
    finish(y, row, n, to);
  });
}

void gated_backward(Gate gate, const FloatRows& grad, const FloatRows& g, const FloatRows& u,
                    int64_t m, int64_t n, const MutableFloatRows& dg, const MutableFloatRows& du,
                    const Threads& threads) {
  const RowsPath& loops = path();
  for_rows<5>(m, n, 6, threads, [&](int64_t row, const std::array<float*, 5>& buffers) {
    float *to_g = target_of(dg, row, buffers[3]), *to_u = target_of(du, row, buffers[4]);
    loops.gated_backward(gate, row_of(grad, row, n, buffers[0]), row_of(g, row, n, buffers[1]),
                         row_of(u, row, n, buffers[2]), n, to_g, to_u);
    finish(dg, row, n, to_g);
    finish(du, row, n, to_u);
  });
}

void rotate(const FloatRows& x, int64_t m, int64_t heads, int64_t d, int64_t width,
            const float* cos, const float* sin, bool back, const MutableFloatRows& y,
            const Threads& threads) {
  const RowsPath& loops = path();
  const int64_t half = width / 2;
  for_rows<2>(m, heads * d, 1, threads, [&](int64_t row, const std::array<float*, 2>& buffers) {
    const float* from = row_of(x, row, heads * d, buffers[0]);
    float* to = target_of(y, row, buffers[1]);
    for (int64_t h = 0; h < heads; ++h, from += d, to += d) {
      loops.rotate(from, cos + row * half, sin + row * half, back ? -1.0f : 1.0f, half, to);
      if (from != to) std::copy(from + 2 * half, from + d, to + 2 * half);
    }
    finish(y, row, heads * d, target_of(y, row, buffers[1]));
  });
}

}  // namespace budwood::kernels
