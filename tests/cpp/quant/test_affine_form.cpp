#include <bit>

#include <budwood/quant/quantize.h>

#include "packed_reference.h"

using namespace budwood::quant;

namespace {

at::Tensor decoded(const Weight& w, int64_t group_size) {
  auto codes = w.parts[0].to(at::kLong);
  if (w.format == Format::affine4)
    codes = torch::stack({codes.remainder(16), codes.floor_divide(16)}, 2)
                .view({w.out, -1})
                .slice(1, 0, w.in);
  const auto group = torch::arange(w.in).floor_divide(group_size);
  const auto scales = w.parts[1].index_select(1, group);
  const auto zeros = w.parts[2].to(at::kFloat).index_select(1, group);
  return scales * (codes.to(at::kFloat) - zeros);
}

}  // namespace

TEST_CASE(
    "group-affine integers multiply like their dequantised matrix, with either kind of zero") {
  torch::manual_seed(0);
  for (const char* format : {"int4", "affine8"})
    for (const auto& [in, size] :
         std::vector<std::array<int64_t, 2>>{{192, 64}, {75, 32}, {5, 128}}) {
      CAPTURE(format);
      CAPTURE(in);
      const auto plain = torch::randn({37, in});
      const auto w = quantize(plain, {.format = format, .block_size = size});
      check_products(w, decoded(w, size));
      CHECK(distance(w.rows(0, 37, at::kFloat), plain) <
            (w.format == Format::affine4 ? 0.15 : 0.01));
      const auto moved = with_part(w, 2, w.parts[2].to(at::kFloat) + 0.37);
      check_products(moved, decoded(moved, size));
    }
}

TEST_CASE("columns may be stored in another order") {
  torch::manual_seed(0);
  for (const char* format : {"int4", "affine8"}) {
    auto w = quantize(torch::randn({37, 75}), {.format = format, .block_size = 32});
    const auto order = torch::randperm(75);
    w.parts.push_back(order.to(at::kInt));
    const auto in_order = [&](const at::Tensor& stored) {
      return torch::empty_like(stored).index_copy_(1, order, stored);
    };
    check_products(w, in_order(decoded(w, 32)));
    const auto moved = with_part(w, 2, w.parts[2].to(at::kFloat) + 0.37);
    check_products(moved, in_order(decoded(moved, 32)));
    check_refused(with_part(w, 4, order));
    check_refused(with_part(w, 4, w.parts[4].slice(0, 1).contiguous()));
    check_refused(with_part(w, 4, w.parts[4] + 1));
    check_refused(with_part(w, 4, w.parts[4] - 1));
    check_refused(with_part(w, 4, torch::zeros({75}, at::kInt)));
  }
}

TEST_CASE("int8 rows multiply like their dequantised matrix") {
  torch::manual_seed(0);
  const auto plain = torch::randn({37, 75});
  const auto w = quantize(plain, {.format = "int8"});
  const auto inverse = std::bit_cast<float>(0x3c010204u);
  check_products(w, w.parts[0].to(at::kFloat) * w.parts[1].unsqueeze(1) * inverse);
  CHECK(distance(w.rows(0, 37, at::kFloat), plain) < 0.01);
}

TEST_CASE("parts that do not fit an integer weight are refused") {
  const auto w = quantize(torch::randn({6, 65}), {.format = "int4"});
  for (size_t i = 0; i < 3; ++i)
    check_refused(with_part(w, i, w.parts[i].slice(0, 1).contiguous()));
  check_refused(with_part(w, 2, w.parts[2].to(at::kHalf)));
  check_refused(with_part(w, 3, torch::tensor({0}, at::kLong)));
  check_refused(with_part(w, 3, torch::tensor({32}, at::kLong)));
  const auto rows = quantize(torch::randn({6, 65}), {.format = "int8"});
  check_refused(with_part(rows, 0, rows.parts[0].to(at::kByte)));
  check_refused(with_part(rows, 1, rows.parts[1].slice(0, 1).contiguous()));
  CHECK_THROWS_AS(quantize(torch::randn({4, 4}), {.format = "int4", .block_size = 0}),
                  budwood::Error);
  CHECK_THROWS_AS(quantize(torch::randn({4, 4}), {.format = "int8", .double_quant = true}),
                  budwood::Error);
}
