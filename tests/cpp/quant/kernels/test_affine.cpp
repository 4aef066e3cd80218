#include <budwood/quant/error.h>
#include <budwood/quant/kernels/affine.h>
#include <doctest/doctest.h>

#include <algorithm>

#include "test_data.h"

using namespace budwood::quant::kernels;

namespace {

struct Matrix {
  int bits;
  int64_t rows;
  int64_t cols;
  int64_t group_size;
  std::vector<uint8_t> codes;
  std::vector<float> scales;
  std::vector<uint8_t> zero_points;

  AffineView view() const {
    AffineView view;
    view.bits = bits;
    view.codes = codes.data();
    view.scales = scales.data();
    view.zero_points = zero_points.data();
    view.rows = rows;
    view.cols = cols;
    view.group_size = group_size;
    return view;
  }
};

Matrix quantized(int bits, AffineMode mode, const std::vector<float>& src, int64_t rows,
                 int64_t cols, int64_t group_size) {
  const int64_t bytes = affine_row_bytes(bits, cols);
  const int64_t groups = affine_groups(cols, group_size);
  Matrix m{bits, rows, cols, group_size, {}, {}, {}};
  m.codes.resize(static_cast<size_t>(rows * bytes));
  m.scales.resize(static_cast<size_t>(rows * groups));
  m.zero_points.resize(static_cast<size_t>(rows * groups));
  for (int64_t r = 0; r < rows; ++r) {
    REQUIRE(quantize_affine_row(bits, mode, src.data() + r * cols, cols, group_size,
                                m.codes.data() + r * bytes, m.scales.data() + r * groups,
                                m.zero_points.data() + r * groups)
                .ok());
  }
  return m;
}

std::vector<float> dequantized(const AffineView& view) {
  std::vector<float> values(static_cast<size_t>(view.rows * view.cols));
  dequantize_affine(view, 0, view.rows, FloatType::fp32, values.data());
  return values;
}

}  // namespace

TEST_CASE("int4 codes lie low nibble first and rows share no byte") {
  const std::vector<uint8_t> src = {1, 2, 3, 4, 5};
  std::vector<uint8_t> codes(3);
  pack_affine_codes(4, src.data(), 5, codes.data());
  CHECK(hex(codes) == "21 43 05");
  std::vector<uint8_t> back(5);
  unpack_affine_codes(4, codes.data(), 5, back.data());
  CHECK(back == src);
  CHECK(affine_row_bytes(4, 5) == 3);
  CHECK(affine_row_bytes(8, 5) == 5);
}

TEST_CASE("grid points quantise to themselves") {
  // scale 0.5, zero 4: (q - 4) / 2 for q = 0..15.
  std::vector<float> src(16);
  for (int q = 0; q < 16; ++q) {
    src[static_cast<size_t>(q)] = static_cast<float>(q - 4) * 0.5f;
  }
  const Matrix m = quantized(4, AffineMode::asymmetric, src, 1, 16, 16);
  CHECK(m.scales[0] == 0.5f);
  CHECK(m.zero_points[0] == 4);
  CHECK(hex(m.codes) == "10 32 54 76 98 ba dc fe");
  CHECK(dequantized(m.view()) == src);
}

TEST_CASE("the error is at most half a step and zero is kept exactly") {
  for (int bits : {4, 8}) {
    for (AffineMode mode : {AffineMode::asymmetric, AffineMode::symmetric}) {
      for (int64_t group_size : {7, 16, 64, 1000}) {
        const int64_t rows = 5;
        const int64_t cols = 131;
        std::vector<float> src = normal_floats(rows * cols, 17);
        src[3] = 0.0f;
        const Matrix m = quantized(bits, mode, src, rows, cols, group_size);
        const std::vector<float> back = dequantized(m.view());
        CHECK(back[3] == 0.0f);
        const int64_t groups = affine_groups(cols, group_size);
        for (int64_t i = 0; i < rows * cols; ++i) {
          const auto at = static_cast<size_t>(i);
          const int64_t group = i / cols * groups + i % cols / group_size;
          const float step = m.scales[static_cast<size_t>(group)];
          // The zero point is rounded too, so an end of the range may be clamped half a step away.
          const float bound = mode == AffineMode::symmetric ? 0.5f : 1.0f;
          REQUIRE(std::fabs(back[at] - src[at]) <= bound * step * 1.0001f);
        }
      }
    }
  }
}

TEST_CASE("one-sided and constant groups stay within their grid") {
  const std::vector<float> src = {5, 6, 7, 8, -3, -3, -3, -3, 0, 0, 0, 0};
  const Matrix m = quantized(8, AffineMode::asymmetric, src, 1, 12, 4);
  CHECK(m.zero_points == std::vector<uint8_t>{0, 255, 0});
  CHECK(m.scales[2] == 1.0f);
  const std::vector<float> back = dequantized(m.view());
  for (size_t i = 0; i < src.size(); ++i) {
    CHECK(back[i] == doctest::Approx(src[i]).epsilon(0.005));
  }
  const Matrix symmetric = quantized(4, AffineMode::symmetric, src, 1, 12, 4);
  CHECK(symmetric.zero_points == std::vector<uint8_t>{8, 8, 8});
  CHECK(dequantized(symmetric.view())[11] == 0.0f);
}

TEST_CASE("float zeros shift a group by any amount") {
  const std::vector<float> src = normal_floats(64, 3);
  const Matrix m = quantized(4, AffineMode::asymmetric, src, 1, 64, 32);
  const std::vector<float> zeros = {static_cast<float>(m.zero_points[0]) - 0.25f,
                                    static_cast<float>(m.zero_points[1])};
  AffineView view = m.view();
  view.zeros = zeros.data();
  const std::vector<float> shifted = dequantized(view);
  const std::vector<float> plain = dequantized(m.view());
  for (size_t i = 0; i < 64; ++i) {
    const double expected = i < 32 ? plain[i] + 0.25 * m.scales[0] : plain[i];
    CHECK(shifted[i] == doctest::Approx(expected).epsilon(1e-6));
  }
}

TEST_CASE("affine rows agree bit for bit on every instruction set, whole and in ranges") {
  std::mt19937 generator(5);
  for (int bits : {4, 8}) {
    for (int64_t group_size : {5, 32, 64, 100, 3000}) {
      const int64_t rows = 3;
      const int64_t cols = 2309;
      std::vector<float> src = normal_floats(rows * cols, 77);
      for (size_t i = 0; i < src.size(); i += 5) {
        src[i] = std::round(src[i] * 2.0f) / 2.0f;
      }
      ScopedIsa scope(Isa::scalar);
      const Matrix expected = quantized(bits, AffineMode::asymmetric, src, rows, cols, group_size);
      const std::vector<float> values = dequantized(expected.view());
      for (Isa isa : wide_isas()) {
        CAPTURE(isa_name(isa));
        ScopedIsa wide(isa);
        const Matrix m = quantized(bits, AffineMode::asymmetric, src, rows, cols, group_size);
        CHECK(m.codes == expected.codes);
        CHECK(same_bits(m.scales, expected.scales));
        CHECK(m.zero_points == expected.zero_points);
        CHECK(same_bits(dequantized(m.view()), values));
        for (int trial = 0; trial < 40; ++trial) {
          const int64_t begin = generator() % cols;
          const int64_t n = generator() % (cols - begin + 1);
          const int64_t row = trial % rows;
          std::vector<float> part(static_cast<size_t>(n));
          std::vector<uint16_t> halves(static_cast<size_t>(n));
          dequantize_affine_row(m.view(), row, begin, n, FloatType::fp32, part.data());
          dequantize_affine_row(m.view(), row, begin, n, FloatType::fp16, halves.data());
          const auto from = values.begin() + row * cols + begin;
          CHECK(same_bits(part, {from, from + n}));
          bool rounded_once = true;
          for (size_t i = 0; i < halves.size(); ++i) {
            rounded_once = rounded_once && halves[i] == fp32_to_fp16(part[i]);
          }
          CHECK(rounded_once);
        }
      }
    }
  }
}

TEST_CASE("affine quantising reports NaN, infinity and ranges beyond fp32") {
  for (Isa isa : all_isas()) {
    ScopedIsa scope(isa);
    std::vector<float> src = normal_floats(70, 1);
    std::vector<uint8_t> codes(70);
    std::vector<float> scales(5);
    std::vector<uint8_t> zero_points(5);
    const auto status = [&] {
      return quantize_affine_row(4, AffineMode::asymmetric, src.data(), 70, 16, codes.data(),
                                 scales.data(), zero_points.data());
    };
    src[66] = std::nanf("");
    CHECK(status().fault == Fault::not_finite);
    CHECK(status().index == 66);
    src[66] = 3e38f;
    src[67] = -3e38f;
    CHECK(status().fault == Fault::out_of_range);
    CHECK(status().index == 64);
  }
}

TEST_CASE("other widths, group sizes and places outside the matrix are refused") {
  const Matrix m = quantized(4, AffineMode::symmetric, normal_floats(64, 1), 2, 32, 16);
  float values[64];
  CHECK_THROWS_AS(dequantize_affine_row(m.view(), 2, 0, 1, FloatType::fp32, values),
                  budwood::Error);
  CHECK_THROWS_AS(dequantize_affine_row(m.view(), 0, 30, 3, FloatType::fp32, values),
                  budwood::Error);
  AffineView view = m.view();
  view.bits = 3;
  CHECK_THROWS_AS(dequantize_affine(view, 0, 2, FloatType::fp32, values), budwood::Error);
  view.bits = 4;
  view.group_size = 0;
  CHECK_THROWS_AS(dequantize_affine(view, 0, 2, FloatType::fp32, values), budwood::Error);
}
