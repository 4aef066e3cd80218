#include <budwood/quant/kernels/bf16_choice.h>
#include <budwood/quant/kernels/gemm.h>
#include <budwood/quant/kernels/int8.h>
#include <doctest/doctest.h>

#include <limits>
#include <memory>
#include <thread>

#include "test_data.h"

using namespace budwood::quant::kernels;

namespace {

using Floats = std::vector<float>;

/// Rows of floats in one of the three types, with garbage between and after the rows.
struct Stored {
  FloatType type;
  int64_t stride;
  std::vector<uint8_t> bytes;

  Stored(const Floats& values, int64_t rows, int64_t cols, FloatType t, int64_t gap)
      : type(t), stride(cols + gap), bytes(random_bytes(rows * stride * float_bytes(t) + 1, 9)) {
    for (int64_t r = 0; r < rows; ++r) {
      fp32_to(type, values.data() + r * cols, at(r), cols);
    }
  }
  uint8_t* at(int64_t row) { return bytes.data() + row * stride * float_bytes(type); }
  Floats floats(int64_t rows, int64_t cols) {
    Floats values(static_cast<size_t>(rows * cols));
    for (int64_t r = 0; r < rows; ++r) {
      to_fp32(type, at(r), values.data() + r * cols, cols);
    }
    return values;
  }
};

Threads threads_of(int count) {
  return {count, [](int n, const std::function<void(int)>& body) {
            std::vector<std::thread> threads;
            for (int i = 0; i < n; ++i) {
              threads.emplace_back([&body, i] { body(i); });
            }
            for (auto& thread : threads) {
              thread.join();
            }
          }};
}

Floats decoded(const Matrix& w) {
  Floats values(static_cast<size_t>(w.rows() * w.cols()));
  w.decode(0, w.rows(), 0, w.cols(), values.data(), w.cols());
  return values;
}

struct Problem {
  const Matrix& w;
  bool transposed;
  int64_t m;
  FloatType type = FloatType::fp32;
  int64_t rank = 0;
  bool bias = false;
  bool add = false;
  int64_t gap = 0;

  int64_t n() const { return transposed ? w.rows() : w.cols(); }
  int64_t k() const { return transposed ? w.cols() : w.rows(); }
  Floats x() const { return Stored(normal_floats(m * k(), 1), m, k(), type, 0).floats(m, k()); }
  Floats y() const { return Stored(normal_floats(m * n(), 2), m, n(), type, 0).floats(m, n()); }
  Floats left() const { return normal_floats(m * rank, 3); }
  Floats right() const { return normal_floats(n() * rank, 4); }
  Floats bias_values() const { return normal_floats(n(), 5); }

  Floats product(int threads = 1) const {
    Stored from(x(), m, k(), type, gap), to(y(), m, n(), type, gap);
    const auto t = left(), b = right(), added = bias_values();
    GemmOptions options;
    options.bias = bias ? added.data() : nullptr;
    options.add = add;
    options.threads = threads_of(threads);
    options.low_rank = {t.data(), rank, b.data(), 1, rank, rank, 0.5f};
    if (!transposed) {
      options.low_rank.right_rank_stride = n();
      options.low_rank.right_column_stride = 1;
    }
    const FloatRows rows{from.bytes.data(), type, from.stride};
    const MutableFloatRows result{to.bytes.data(), type, to.stride};
    (transposed ? multiply_transposed : multiply)(w, rows, m, result, options);
    return to.floats(m, n());
  }

  /// The formula in double, and what rounding may have done to it: the sum of magnitudes.
  void check(const Floats& found) const {
    const auto values = decoded(w), from = x(), old = y(), t = left(), b = right(),
               added = bias_values();
    // A sum of up to 1100 products in fp32; results have 11 bits in fp16; bf16 rounds W and the
    // results to 8 bits.
    const double share = type == FloatType::fp32   ? 3e-6
                         : type == FloatType::fp16 ? 0x1p-11 + 3e-6
                                                   : 0x1p-7 + 0x1p-16;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n(); ++j) {
        double sum = 0.0, size = 1e-30;
        const auto term = [&](double product) {
          sum += product;
          size += std::fabs(product);
        };
        for (int64_t l = 0; l < k(); ++l) {
          const auto at = static_cast<size_t>(transposed ? j * k() + l : l * n() + j);
          term(double{from[static_cast<size_t>(i * k() + l)]} * double{values[at]});
        }
        for (int64_t l = 0; l < rank; ++l) {
          const auto at = static_cast<size_t>(transposed ? j * rank + l : l * n() + j);
          term(0.5 * double{t[static_cast<size_t>(i * rank + l)]} * double{b[at]});
        }
        term(bias ? double{added[static_cast<size_t>(j)]} : 0.0);
        term(add ? double{old[static_cast<size_t>(i * n() + j)]} : 0.0);
        const double off = std::fabs(double{found[static_cast<size_t>(i * n() + j)]} - sum);
        if (!(off <= share * size)) {
          FAIL_CHECK("row " << i << ", column " << j << " is off by " << off << " of " << size);
          return;
        }
      }
    }
  }
};

}  // namespace

TEST_CASE("products agree with the formula for all shapes, tails and numbers of rows") {
  for (const auto& [rows, cols] : std::vector<std::array<int64_t, 2>>{
           {1, 1}, {3, 70}, {16, 5}, {65, 33}, {80, 128}, {131, 259}, {20, 1030}, {1100, 17}}) {
    const auto values = normal_floats(rows * cols, 7);
    for (const auto& [w_type, type] :
         std::vector<std::array<FloatType, 2>>{{FloatType::fp32, FloatType::fp32},
                                               {FloatType::fp32, FloatType::bf16},
                                               {FloatType::bf16, FloatType::bf16},
                                               {FloatType::bf16, FloatType::fp32},
                                               {FloatType::fp16, FloatType::fp16}}) {
      const int64_t gap = (rows + cols) % 3;
      Stored stored(values, rows, cols, w_type, gap);
      const DenseMatrix w(stored.bytes.data(), w_type, rows, cols, cols + gap);
      for (const Isa isa : all_isas()) {
        const ScopedIsa scope(isa);
        for (const bool transposed : {true, false}) {
          for (int64_t m = 0; m <= 20; m += m < 9 ? 1 : 5) {
            if (isa == Isa::scalar && m != 1 && m != 9) {
              continue;
            }
            CAPTURE(isa_name(isa));
            CAPTURE(rows);
            CAPTURE(cols);
            CAPTURE(m);
            CAPTURE(transposed);
            Problem p{w, transposed, m, type};
            p.gap = m % 3;
            p.rank = m % 4 == 0 ? 0 : m;
            p.bias = m % 2 == 0;
            p.add = m % 3 == 0;
            p.check(p.product());
          }
        }
      }
    }
  }
}

TEST_CASE("rows and columns of a matrix are scaled as it is read") {
  const int64_t rows = 70, cols = 130;
  const auto values = normal_floats(rows * cols, 7), factors = normal_floats(cols, 8);
  const DenseMatrix dense(values.data(), FloatType::fp32, rows, cols, cols);
  const auto codes = random_bytes(rows * cols, 3);
  const Int8Matrix int8(reinterpret_cast<const int8_t*>(codes.data()), factors.data(), rows, cols);
  for (const Matrix* inner :
       {static_cast<const Matrix*>(&dense), static_cast<const Matrix*>(&int8)})
    for (const auto along : {ScaledMatrix::Along::rows, ScaledMatrix::Along::cols}) {
      const ScaledMatrix w(*inner, factors.data(), along);
      auto wanted = decoded(*inner);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < cols; ++c)
          wanted[static_cast<size_t>(r * cols + c)] *=
              factors[static_cast<size_t>(along == ScaledMatrix::Along::rows ? r : c)];
      CHECK(decoded(w) == wanted);
      std::vector<float> piece(3 * 64);
      w.decode(5, 3, 64, 64, piece.data(), 64);
      for (size_t i = 0; i < piece.size(); ++i)
        CHECK(piece[i] == wanted[(5 + i / 64) * static_cast<size_t>(cols) + 64 + i % 64]);
      for (const bool transposed : {true, false})
        for (const int64_t m : {1, 5, 40}) {
          const Problem p{w, transposed, m};
          p.check(p.product());
        }
    }
}

TEST_CASE("a scaled 4-bit row is multiplied straight from its codes") {
  const int64_t rows = 12, cols = 128;
  const auto plain = normal_floats(rows * cols, 7), factors = normal_floats(rows, 8);
  std::vector<uint8_t> codes(static_cast<size_t>(rows * cols / 2));
  Floats absmax(static_cast<size_t>(rows * cols / 64), 0.5f);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i * 37);
  Bnb4View view;
  view.codes = codes.data();
  view.absmax = absmax.data();
  view.count = rows * cols;
  view.block_size = 64;
  const Bnb4Matrix inner(view, cols);
  const ScaledMatrix w(inner, factors.data(), ScaledMatrix::Along::rows);
  const Problem p{w, true, 1};
  p.check(p.product());
  const ScaledMatrix columns(inner, plain.data(), ScaledMatrix::Along::cols);
  const Problem q{columns, true, 1};
  q.check(q.product());
}

TEST_CASE("every instruction set and every number of threads gives the same bits") {
  const auto values = normal_floats(300 * 1100, 7);
  const DenseMatrix w(values.data(), FloatType::fp32, 300, 1100, 1100);
  for (const bool transposed : {true, false}) {
    for (const int64_t m : {1, 3, 7, 13, 130}) {
      for (const auto type : {FloatType::fp32, FloatType::fp16, FloatType::bf16}) {
        Problem p{w, transposed, m, type};
        p.rank = 5;
        p.bias = true;
        const auto wanted = [&] {
          const ScopedBf16 arithmetic(false);
          const ScopedIsa scope(m < 100               ? Isa::scalar
                                : wide_isas().empty() ? Isa::scalar
                                                      : wide_isas()[0]);
          return p.product();
        }();
        for (const Isa isa : wide_isas()) {
          const ScopedIsa scope(isa);
          CAPTURE(isa_name(isa));
          CAPTURE(m);
          CAPTURE(transposed);
          for (const bool bf16 : {false, true}) {
            if (bf16 && !has_avx512_bf16()) {
              continue;
            }
            const ScopedBf16 arithmetic(bf16);
            const bool own_bits = type == FloatType::bf16 && bf16 && (m > 8 || !transposed);
            const auto base = own_bits ? p.product() : wanted;
            for (const int threads : {1, 2, 3, 8}) {
              CHECK(p.product(threads) == base);
            }
          }
        }
      }
    }
  }
}

TEST_CASE("packed matrices are multiplied like the values they stand for") {
  constexpr int64_t kRows = 70, kCols = 768;
  const auto plain = normal_floats(kRows * kCols, 3, 0.1f);
  std::vector<std::unique_ptr<Matrix>> matrices;

  std::vector<uint8_t> nf4(static_cast<size_t>(bnb4_bytes(kRows * kCols)));
  Floats absmax(static_cast<size_t>(bnb4_blocks(kRows * kCols, 64)));
  quantize_bnb4(Bnb4Type::nf4, plain.data(), kRows * kCols, 64, nf4.data(), absmax.data());
  Bnb4View view;
  view.codes = nf4.data();
  view.absmax = absmax.data();
  view.count = kRows * kCols;
  matrices.push_back(std::make_unique<Bnb4Matrix>(view, kCols));
  // The same codes as rows of an odd length: blocks cross rows, rows begin inside bytes.
  view.count = 700 * 75;
  matrices.push_back(std::make_unique<Bnb4Matrix>(view, 75));
  std::vector<uint8_t> nested(absmax.size());
  Floats outer((absmax.size() + 255) / 256);
  const float offset = 0.25f;
  quantize_absmax(absmax.data(), static_cast<int64_t>(absmax.size()), offset, nested.data(),
                  outer.data());
  view.count = kRows * kCols;
  view.absmax = nullptr;
  view.nested = {nested.data(), dynamic_map(), outer.data(), offset, 256};
  matrices.push_back(std::make_unique<Bnb4Matrix>(view, kCols));

  std::vector<std::vector<uint8_t>> blocks;
  for (const auto type : {GgmlType::q4_0, GgmlType::q4_1, GgmlType::q8_0, GgmlType::q4_k,
                          GgmlType::q5_k, GgmlType::q6_k}) {
    blocks.push_back(random_bytes(row_bytes(type, kRows * kCols), 11));
    if (ggml_type_traits(type).writable) {
      quantize_row(type, plain.data(), blocks.back().data(), kRows * kCols);
    } else {  // no infinite scales
      for (auto& byte : blocks.back()) {
        byte &= 0x3f;
      }
    }
    matrices.push_back(std::make_unique<GgufMatrix>(type, blocks.back().data(), kRows, kCols));
  }

  const auto codes = random_bytes(kRows * kCols, 12);
  const auto scales = normal_floats(kRows * 24, 13);
  for (const int bits : {4, 8}) {
    for (const int64_t cols : {kCols, int64_t{99}}) {
      AffineView affine{.bits = bits, .codes = codes.data(), .scales = scales.data()};
      affine.zeros = scales.data();
      affine.rows = kRows;
      affine.cols = cols;
      affine.group_size = 32;
      matrices.push_back(std::make_unique<AffineMatrix>(affine));
    }
  }
  matrices.push_back(std::make_unique<Int8Matrix>(reinterpret_cast<const int8_t*>(codes.data()),
                                                  scales.data(), kRows, kCols));

  for (size_t i = 0; i < matrices.size(); ++i) {
    const Matrix& w = *matrices[i];
    const auto values = decoded(w);
    const DenseMatrix dense(values.data(), FloatType::fp32, w.rows(), w.cols(), w.cols());
    for (const Isa isa : wide_isas()) {
      const ScopedIsa scope(isa);
      for (const bool transposed : {true, false}) {
        for (const int64_t m : {1, 6, 33}) {
          CAPTURE(i);
          CAPTURE(m);
          CAPTURE(transposed);
          for (const auto type : {FloatType::fp32, FloatType::bf16}) {
            const Problem p{w, transposed, m, type};
            const auto found = p.product();
            p.check(found);
            CHECK(p.product(3) == found);
            CHECK(Problem{dense, transposed, m, type}.product() == found);
          }
        }
      }
    }
  }
}

TEST_CASE("a NaN or an infinity of x stays in its row") {
  const auto values = normal_floats(70 * 90, 7);
  const DenseMatrix w(values.data(), FloatType::fp32, 70, 90, 90);
  for (const Isa isa : all_isas()) {
    const ScopedIsa scope(isa);
    for (const int64_t m : {2, 12}) {
      for (const float bad :
           {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        auto x = normal_floats(m * 90, 1);
        Floats y(static_cast<size_t>(m * 70));
        x[90 + 89] = bad;
        multiply_transposed(w, {x.data(), FloatType::fp32, 90}, m, {y.data(), FloatType::fp32, 70});
        for (int64_t i = 0; i < m * 70; ++i) {
          CHECK(std::isfinite(y[static_cast<size_t>(i)]) == (i / 70 != 1));
        }
      }
    }
  }
}
