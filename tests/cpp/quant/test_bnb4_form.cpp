#include <budwood/quant/kernels/bnb4.h>
#include <budwood/quant/quantize.h>

#include <limits>

#include "packed_reference.h"

using namespace budwood::quant;

namespace {

// The formula in plain torch: table[code] * absmax of the element's block in the flat matrix.
at::Tensor decoded(const Weight& w, const at::Tensor& absmax, int64_t block_size) {
  const auto type = w.format == Format::nf4 ? kernels::Bnb4Type::nf4 : kernels::Bnb4Type::fp4;
  const auto table =
      torch::from_blob(const_cast<float*>(kernels::bnb4_table(type)), {16}, at::kFloat);
  const auto bytes = w.parts[0].view({-1}).to(at::kLong);
  const auto codes = torch::stack({bytes.floor_divide(16), bytes.remainder(16)}, 1).view({-1});
  const int64_t n = w.out * w.in;
  const auto block = torch::arange(n).floor_divide(block_size);
  return (table.index({codes.slice(0, 0, n)}) * absmax.index({block})).view({w.out, w.in});
}

}  // namespace

TEST_CASE("nf4 and fp4 multiply like their dequantised matrix, blocks crossing rows or not") {
  torch::manual_seed(0);
  for (const char* format : {"nf4", "fp4"})
    for (const auto& [out, in, size] : std::vector<std::array<int64_t, 3>>{
             {37, 192, 64}, {37, 75, 32}, {40, 130, 64}, {3, 5, 4096}, {1500, 576, 64}}) {
      CAPTURE(format);
      CAPTURE(in);
      const auto plain = torch::randn({out, in});
      const auto w = quantize(plain, {.format = format, .block_size = size});
      CHECK((w.parts[0].dim() == 2) == (in % size == 0));
      check_products(w, decoded(w, w.parts[1], size));
      CHECK(distance(w.rows(0, out, at::kFloat), plain) < 0.25);
    }
}

TEST_CASE("doubly quantised scales are read as bitsandbytes reads them") {
  torch::manual_seed(0);
  const auto plain = torch::randn({300, 192});
  const auto w = quantize(plain, {.format = "nf4", .block_size = 64, .double_quant = true});
  REQUIRE(w.parts.size() == 6);
  const auto blocks = torch::arange(w.parts[1].numel()).floor_divide(256);
  const auto absmax =
      w.parts[4].index({w.parts[1].to(at::kLong)}) * w.parts[3].index({blocks}) + w.parts[5];
  check_products(w, decoded(w, absmax, 64));
  const auto single = quantize(plain, {.format = "nf4"});
  CHECK(torch::equal(single.parts[0], w.parts[0]));
  CHECK(distance(absmax, single.parts[1]) < 0.01);
  CHECK(w.bytes() < single.bytes());
}

TEST_CASE("quantising in panels gives the codes of quantising at once, from any float dtype") {
  torch::manual_seed(0);
  const auto plain = torch::randn({700, 333}).to(at::kBFloat16);
  const auto w = quantize(plain, {.format = "nf4"});
  const auto values = plain.to(at::kFloat).contiguous();
  auto codes = at::empty({kernels::bnb4_bytes(values.numel())}, at::kByte);
  auto absmax = at::empty({kernels::bnb4_blocks(values.numel(), 64)}, at::kFloat);
  kernels::quantize_bnb4(kernels::Bnb4Type::nf4, values.data_ptr<float>(), values.numel(), 64,
                         codes.data_ptr<uint8_t>(), absmax.data_ptr<float>());
  CHECK(torch::equal(w.parts[0], codes));
  CHECK(torch::equal(w.parts[1], absmax));
}

TEST_CASE("a value that is not finite is refused with its place") {
  for (const char* format : {"nf4", "fp4", "int8", "int4", "affine8"})
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
      auto plain = torch::randn({400, 300});
      plain[321][17] = bad;
      CHECK_THROWS_WITH_AS(quantize(plain, {.format = format}),
                           doctest::Contains("row 321, column 17"), budwood::Error);
    }
}

TEST_CASE("parts that do not fit a bnb4 weight are refused") {
  const auto w = quantize(torch::randn({6, 64}), {.format = "nf4"});
  check_refused(with_part(w, 0, w.parts[0].slice(0, 0, 5).contiguous()));
  check_refused(with_part(w, 0, w.parts[0].to(at::kChar)));
  check_refused(with_part(w, 1, w.parts[1].slice(0, 1).contiguous()));
  check_refused(with_part(w, 1, w.parts[1].to(at::kHalf)));
  check_refused(with_part(w, 2, torch::tensor({48}, at::kLong)));
  check_refused(with_part(w, 2, torch::tensor({64}, at::kInt)));
  auto four = w;
  four.parts.push_back(w.parts[1]);
  check_refused(four);
  CHECK_THROWS_AS(quantize(torch::randn({4, 4}), {.format = "nf4", .block_size = 48}),
                  budwood::Error);
  CHECK_THROWS_WITH_AS(quantize(torch::randn({4, 4}), {.format = "nf5"}), doctest::Contains("nf5"),
                       budwood::Error);
  CHECK_THROWS_AS(quantize(torch::ones({4, 4}, at::kLong)), budwood::Error);
}
