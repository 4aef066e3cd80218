#include <budwood/quant/kernels/int8.h>
#include <doctest/doctest.h>

#include <algorithm>
#include <array>

#include "device_rows.h"

using namespace budwood::quant::kernels;

namespace {

// The device's decoding of all rows and of chosen ones, in three types, has the bits of `wanted`;
// its products with few tokens are those of `wanted` in float64.
template <class Rows>
void check_rows(const Rows& w, const std::vector<float>& wanted) {
  const int64_t rows = w.rows, cols = w.cols;
  CAPTURE(rows);
  CAPTURE(cols);
  std::vector<float> found(wanted.size(), -7.0f);
  REQUIRE(decode_on_host(w, 0, rows, nullptr, {found.data(), FloatType::fp32}));
  CHECK(same_values(found, wanted));

  const std::vector<int64_t> ids = {rows - 1, 0, rows / 2};
  for (const FloatType type : {FloatType::bf16, FloatType::fp16}) {
    std::vector<uint16_t> halves(static_cast<size_t>(3 * cols));
    std::vector<uint16_t> rounded(static_cast<size_t>(cols));
    REQUIRE(decode_on_host(w, 0, 3, ids.data(), {halves.data(), type}));
    for (size_t i = 0; i < ids.size(); ++i) {
      fp32_to(type, wanted.data() + ids[i] * cols, rounded.data(), cols);
      CHECK(std::memcmp(rounded.data(), halves.data() + static_cast<int64_t>(i) * cols,
                        rounded.size() * 2) == 0);
    }
  }

  bool finite = true;
  for (float value : wanted) {
    finite = finite && std::isfinite(value);
  }
  for (const int tokens : {1, 3, kFewTokens}) {
    const std::vector<float> x = normal_floats(tokens * cols, 5);
    std::vector<float> y(static_cast<size_t>(tokens * rows), -7.0f);
    REQUIRE(multiply_on_host(w, {x.data(), FloatType::fp32}, tokens, {y.data(), FloatType::fp32}));
    double worst = 0.0;
    for (int m = 0; m < tokens; ++m) {
      for (int64_t r = 0; r < rows; ++r) {
        double exact = 0.0;
        double size = 1e-30;
        for (int64_t c = 0; c < cols; ++c) {
          const double product =
              static_cast<double>(wanted[static_cast<size_t>(r * cols + c)]) * x[m * cols + c];
          exact += product;
          size += std::fabs(product);
        }
        worst = std::max(worst, std::fabs(y[m * rows + r] - exact) / size);
      }
    }
    if (finite) {
      CHECK(worst < 1e-6);
    }
  }
}

std::vector<float> scalar_bnb4(const Bnb4View& view) {
  ScopedIsa scope(Isa::scalar);
  std::vector<float> values(static_cast<size_t>(view.count));
  dequantize_bnb4(view, 0, view.count, FloatType::fp32, values.data());
  return values;
}

template <int kBits>
void check_affine(int64_t rows, int64_t cols, int64_t group_size) {
  CAPTURE(group_size);
  const int64_t groups = affine_groups(cols, group_size);
  const auto codes = random_bytes(rows * affine_row_bytes(kBits, cols), 1);
  const auto scales = normal_floats(rows * groups, 2);
  const auto zeros = normal_floats(rows * groups, 3, 5.0f);
  const auto zero_points = random_bytes(rows * groups, 4);
  for (const bool integers : {false, true}) {
    for (const bool stated : {false, true}) {
      const AffineView view{.bits = kBits,
                            .codes = codes.data(),
                            .scales = scales.data(),
                            .zeros = integers ? nullptr : zeros.data(),
                            .zero_points = integers ? zero_points.data() : nullptr,
                            .rows = rows,
                            .cols = cols,
                            .group_size = group_size};
      std::vector<float> wanted(static_cast<size_t>(rows * cols));
      {
        ScopedIsa scope(Isa::scalar);
        dequantize_affine(view, 0, rows, FloatType::fp32, wanted.data());
      }
      AffineRows<kBits> w{.rows = rows,
                          .cols = cols,
                          .groups = groups,
                          .group_size = stated ? 0 : group_size,
                          .stated_size = stated ? &group_size : nullptr,
                          .codes = codes.data(),
                          .scales = scales.data(),
                          .zeros = view.zeros,
                          .zero_points = view.zero_points};
      check_rows(w, wanted);

      // A map of the columns that says what the groups say changes nothing; another one does.
      std::vector<int32_t> group_of(static_cast<size_t>(cols));
      for (int64_t c = 0; c < cols; ++c) {
        group_of[static_cast<size_t>(c)] = static_cast<int32_t>(c / group_size);
      }
      w.group_of = group_of.data();
      check_rows(w, wanted);
      if (groups > 1) {
        std::reverse(group_of.begin(), group_of.end());
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < cols; ++c) {
            const int64_t entry = r * groups + group_of[static_cast<size_t>(c)];
            const uint8_t* row = codes.data() + r * affine_row_bytes(kBits, cols);
            const int q = kBits == 8 ? row[c] : c % 2 == 0 ? row[c / 2] & 15 : row[c / 2] >> 4;
            const float zero = integers ? zero_points[static_cast<size_t>(entry)]
                                        : zeros[static_cast<size_t>(entry)];
            wanted[static_cast<size_t>(r * cols + c)] =
                (static_cast<float>(q) - zero) * scales[static_cast<size_t>(entry)];
          }
        }
        check_rows(w, wanted);
      }
    }
  }
}

template <GgmlType kType>
void check_gguf() {
  CAPTURE(ggml_type_name(kType));
  const auto& traits = ggml_type_traits(kType);
  CHECK(gguf_block_bytes(kType) == static_cast<int>(traits.block_bytes));
  CHECK(gguf_block_elements(kType) == static_cast<int>(traits.block));
  for (const int64_t blocks : {1, 3, 8}) {
    const int64_t rows = 5;
    const int64_t cols = blocks * static_cast<int64_t>(traits.block);
    for (const bool zero : {false, true}) {
      // Random bytes hold scales that are NaN, infinite and subnormal as well.
      auto bytes = random_bytes(rows * row_bytes(kType, cols), static_cast<uint32_t>(blocks));
      if (zero) {
        std::fill(bytes.begin(), bytes.end(), 0);
      }
      std::vector<float> wanted(static_cast<size_t>(rows * cols));
      ScopedIsa scope(Isa::scalar);
      dequantize_row(kType, bytes.data(), wanted.data(), rows * cols);
      std::vector<float> found(wanted.size());
      const GgufRows<kType> w{.rows = rows, .cols = cols, .blocks = bytes.data()};
      REQUIRE(decode_on_host(w, 0, rows, nullptr, {found.data(), FloatType::fp32}));
      CHECK(same_values(found, wanted));

      // Scales of ordinary size, for the products.
      constexpr int kHalf = kType == GgmlType::q6_k ? 208 : 0;
      for (size_t b = 0; b < bytes.size(); b += gguf_block_bytes(kType)) {
        bytes[b + kHalf + 1] = static_cast<uint8_t>((bytes[b + kHalf + 1] & 0x83) | 0x30);
        if (kType != GgmlType::q4_0 && kType != GgmlType::q5_0 && kType != GgmlType::q8_0 &&
            kType != GgmlType::q6_k) {
          bytes[b + 3] = static_cast<uint8_t>((bytes[b + 3] & 0x83) | 0x30);
        }
      }
      dequantize_row(kType, bytes.data(), wanted.data(), rows * cols);
      check_rows(w, wanted);
    }
  }
}

}  // namespace

TEST_CASE("a device thread decodes nf4 and fp4 to the CPU's bits, blocks crossing rows or not") {
  for (const Bnb4Type type : {Bnb4Type::nf4, Bnb4Type::fp4}) {
    for (const auto& [rows, cols, size] : std::vector<std::array<int64_t, 3>>{{7, 192, 64},
                                                                              {7, 75, 32},
                                                                              {9, 130, 64},
                                                                              {3, 5, 4096},
                                                                              {1, 1, 32},
                                                                              {4, 264, 128},
                                                                              {300, 192, 64}}) {
      const int64_t count = rows * cols;
      const int64_t blocks = bnb4_blocks(count, size);
      const auto codes = random_bytes(bnb4_bytes(count), 1);
      auto absmax = normal_floats(blocks, 2);
      absmax[0] = 0.0f;
      Bnb4View view{.type = type,
                    .codes = codes.data(),
                    .absmax = absmax.data(),
                    .nested = {},
                    .count = count,
                    .block_size = size};
      Bnb4Rows w{.type = type,
                 .rows = rows,
                 .cols = cols,
                 .block_size = size,
                 .stated_block_size = &size,
                 .codes = codes.data(),
                 .absmax = absmax.data()};
      check_rows(w, scalar_bnb4(view));

      const auto scale_codes = random_bytes(blocks, 3);
      const auto nested = normal_floats((blocks + 255) / 256, 4);
      const float offset = 0.37f;
      view.absmax = nullptr;
      view.nested = {.codes = scale_codes.data(),
                     .map = dynamic_map(),
                     .absmax = nested.data(),
                     .offset = offset};
      w.absmax = nullptr;
      w.absmax_codes = scale_codes.data();
      w.map = dynamic_map();
      w.nested_absmax = nested.data();
      w.offset = &offset;
      check_rows(w, scalar_bnb4(view));
    }
  }
}

TEST_CASE("a device thread decodes affine groups to the CPU's bits, with and without a map") {
  for (const auto& [rows, cols, size] : std::vector<std::array<int64_t, 3>>{
           {5, 128, 32}, {5, 96, 64}, {3, 75, 16}, {4, 40, 5}, {2, 7, 64}, {3, 1, 1}}) {
    check_affine<4>(rows, cols, size);
    check_affine<8>(rows, cols, size);
  }
}

TEST_CASE("a device thread decodes int8 rows to the CPU's bits") {
  for (const auto& [rows, cols] :
       std::vector<std::array<int64_t, 2>>{{5, 128}, {5, 75}, {3, 1}, {2, 1000}}) {
    const auto bytes = random_bytes(rows * cols, 1);
    const auto* codes = reinterpret_cast<const int8_t*>(bytes.data());
    auto scb = normal_floats(rows, 2);
    scb[0] = 0.0f;
    std::vector<float> wanted(static_cast<size_t>(rows * cols));
    ScopedIsa scope(Isa::scalar);
    for (int64_t r = 0; r < rows; ++r) {
      dequantize_int8_row(codes + r * cols, scb[static_cast<size_t>(r)], cols, FloatType::fp32,
                          wanted.data() + r * cols);
    }
    check_rows(Int8Rows{.rows = rows, .cols = cols, .codes = codes, .scb = scb.data()}, wanted);
  }
}

TEST_CASE("a device thread decodes GGUF blocks to the CPU's bits") {
  check_gguf<GgmlType::q4_0>();
  check_gguf<GgmlType::q4_1>();
  check_gguf<GgmlType::q5_0>();
  check_gguf<GgmlType::q5_1>();
  check_gguf<GgmlType::q8_0>();
  check_gguf<GgmlType::q4_k>();
  check_gguf<GgmlType::q5_k>();
  check_gguf<GgmlType::q6_k>();
}

TEST_CASE("a kernel refuses sizes that contradict each other") {
  const int64_t stated = 128;
  const auto codes = random_bytes(64, 1);
  const auto absmax = normal_floats(2, 2);
  Bnb4Rows w{.rows = 2,
             .cols = 64,
             .block_size = 64,
             .stated_block_size = &stated,
             .codes = codes.data(),
             .absmax = absmax.data()};
  CHECK_FALSE(with_opened(w, [](const auto&) {}));
  // One block is one block, whatever its size.
  w.rows = 1;
  CHECK(with_opened(w, [](const auto&) {}));
  AffineRows<4> affine{.rows = 1, .cols = 64, .groups = 2, .stated_size = &stated};
  CHECK_FALSE(with_opened(affine, [](const auto&) {}));
  affine.stated_size = nullptr;
  CHECK_FALSE(with_opened(affine, [](const auto&) {}));
}
