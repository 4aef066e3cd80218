#include <budwood/quant/calibrate/gptq.h>

#include "inputs.h"

using namespace budwood::quant;
using namespace budwood::quant::calibrate;
using namespace budwood::quant::calibrate::testing;

namespace {

struct Grid {
  at::Tensor scale, zero;  // [out, 1], fp64
};

Grid grid_of(const at::Tensor& columns, double top, bool symmetric) {
  auto low = columns.amin(1, true).clamp_max(0), high = columns.amax(1, true).clamp_min(0);
  if (symmetric) {
    high = torch::maximum(-low, high);
    low = -high;
  }
  low = low.to(at::kFloat);
  high = high.to(at::kFloat);
  const auto scale = (high - low) / top;
  const auto zero = symmetric ? torch::full_like(scale, (top + 1) / 2) : (-low / scale).round();
  return {scale.to(at::kDouble), zero.to(at::kDouble)};
}

// Rounds the column [out, 1] that stands at place j and was column `from` of the weight, given all
// columns as they are now and as they were.
using Round = std::function<at::Tensor(const at::Tensor& column, int64_t j, int64_t from,
                                       const at::Tensor& now, const at::Tensor& original)>;

Round affine(const GptqOptions& options) {
  return [options, grid = Grid()](const at::Tensor& column, int64_t j, int64_t from,
                                  const at::Tensor& now, const at::Tensor& original) mutable {
    const double top = options.bits == 4 ? 15 : 255;
    const int64_t in = now.size(1), g = options.group_size;
    if (options.static_groups)
      grid = grid_of(original.slice(1, from / g * g, std::min(in, (from / g + 1) * g)), top,
                     options.symmetric);
    else if (j % g == 0)
      grid = grid_of(now.slice(1, j, std::min(in, j + g)), top, options.symmetric);
    return (((column / grid.scale).round() + grid.zero).clamp(0, top) - grid.zero) * grid.scale;
  };
}

// To the nearest of a block's 16 values, [out, in / size, 16].
Round among(const at::Tensor& blocks, int64_t size) {
  return
      [=](const at::Tensor& column, int64_t, int64_t from, const at::Tensor&, const at::Tensor&) {
        const auto choice = blocks.select(1, from / size);
        return choice.gather(1, (choice - column).abs().argmin(1, /*keepdim=*/true));
      };
}

// The method with the inverse itself: each column's error is spread by a row of the inverse of the
// Hessian of the columns that are left, which then loses this column. Of two values that are
// equally near it takes that of `found`: a symmetric grid puts the largest value of a group between
// two.
at::Tensor by_inverse(at::Tensor w, at::Tensor h, const GptqOptions& options, Round round,
                      const at::Tensor& found) {
  const int64_t in = w.size(1);
  w = w.to(at::kDouble).clone();
  h = h.to(at::kDouble).clone();
  const auto diagonal = h.diagonal().clone();
  auto order = torch::arange(in);
  if (options.act_order) order = torch::argsort(diagonal, /*stable=*/true, 0, true);
  const auto original = w.clone();
  w = w.index_select(1, order);
  h = h.index_select(0, order).index_select(1, order);
  h.diagonal().add_(options.damping * diagonal.mean());
  auto inverse = torch::inverse(h);
  auto result = torch::zeros_like(w);
  for (int64_t j = 0; j < in; ++j) {
    const auto column = w.slice(1, j, j + 1).clone();
    const auto from = order[j].item<int64_t>();
    auto rounded = round(column, j, from, w, original);
    const auto theirs = found.slice(1, from, from + 1).to(at::kDouble);
    const auto farther = (column - theirs).abs() - (column - rounded).abs();
    rounded = torch::where(farther < 1e-6, theirs, rounded);
    result.slice(1, j, j + 1).copy_(rounded);
    const auto row = inverse.slice(0, j, j + 1).clone();
    w -= (column - rounded) / row[0][j] * row;
    inverse -= row.t().matmul(row) / row[0][j];
  }
  auto restored = torch::zeros_like(result);
  restored.index_copy_(1, order, result);
  return restored;
}

}  // namespace

TEST_CASE("GPTQ gives what the method gives with the inverse Hessian itself") {
  torch::manual_seed(1);
  const auto x = inputs(400, 40), w = torch::randn({11, 40}), h = hessian(x);
  for (const int64_t bits : {4, 8})
    for (const int64_t group : {8, 16, 40})
      for (const bool act : {false, true})
        for (const bool fixed : {false, true})
          for (const bool symmetric : {false, true}) {
            const GptqOptions options{.bits = bits,
                                      .group_size = group,
                                      .act_order = act,
                                      .static_groups = fixed,
                                      .symmetric = symmetric,
                                      .block = 8};
            CAPTURE(bits);
            CAPTURE(group);
            CAPTURE(act);
            CAPTURE(fixed);
            CAPTURE(symmetric);
            const auto found = values(gptq(w, h, options)).to(at::kDouble);
            const auto wanted = by_inverse(w, h, options, affine(options), found);
            CHECK(((found - wanted).abs().max()).item<double>() < 1e-5);
          }
}

TEST_CASE("GPTQ does not depend on the block size, whatever the groups") {
  torch::manual_seed(2);
  const auto x = inputs(600, 90), w = torch::randn({13, 90}), h = hessian(x);
  for (const int64_t group : {7, 16, 32, 64, -1})
    for (const bool act : {false, true}) {
      GptqOptions options{.group_size = group, .act_order = act, .block = 1};
      const auto one = gptq(w, h, options);
      for (const int64_t block : {3, 16, 32, 50, 128}) {
        options.block = block;
        const auto other = gptq(w, h, options);
        CAPTURE(block);
        REQUIRE(other.parts.size() == one.parts.size());
        for (size_t i = 0; i < one.parts.size(); ++i)
          CHECK(torch::equal(one.parts[i], other.parts[i]));
      }
    }
}

TEST_CASE("GPTQ disturbs the output less than rounding, and with act-order less again") {
  torch::manual_seed(3);
  const auto x = inputs(2000, 128), w = torch::randn({64, 128}), h = hessian(x);
  for (const int64_t bits : {4, 8}) {
    const double plain = loss(x, w, rtn(w, bits, 32));
    GptqOptions options{.bits = bits, .group_size = 32};
    const double found = loss(x, w, values(gptq(w, h, options)));
    options.act_order = true;
    const double ordered = loss(x, w, values(gptq(w, h, options)));
    options.static_groups = true;
    const double fixed = loss(x, w, values(gptq(w, h, options)));
    CHECK(found < 0.9 * plain);
    CHECK(ordered < found);
    CHECK(fixed < found);
  }
}

TEST_CASE("GPTQ makes bitsandbytes' 4 bits with the errors taken up") {
  torch::manual_seed(7);
  const auto x = inputs(2000, 128), w = torch::randn({24, 128}), h = hessian(x);
  for (const std::string format : {"nf4", "fp4"})
    for (const bool twice : {false, true})
      for (const bool act : {false, true})
        for (const int64_t size : {32, 64}) {
          const GptqOptions options{.format = format,
                                    .group_size = size,
                                    .act_order = act,
                                    .static_groups = true,
                                    .double_quant = twice};
          CAPTURE(format);
          CAPTURE(twice);
          CAPTURE(act);
          auto found = gptq(w, h, options);
          const auto decoded = values(found);
          // The same weight with each code in all places: what a block can be.
          std::vector<at::Tensor> all;
          const auto codes = found.parts[0];
          for (int code = 0; code < 16; ++code) {
            found.parts[0] = torch::full_like(codes, code * 17);
            all.push_back(values(found).view({24, -1, size}).select(2, 0));
          }
          const auto blocks = torch::stack(all, 2).to(at::kDouble);
          const auto wanted = by_inverse(w, h, options, among(blocks, size), decoded);
          CHECK(((decoded - wanted).abs().max()).item<double>() < 1e-5);
          const auto plain =
              values(quantize(w, {.format = format, .block_size = size, .double_quant = twice}));
          CHECK(loss(x, w, decoded) < 0.8 * loss(x, w, plain));
        }
}

TEST_CASE("scales of 4-bit blocks round the block better than its largest value") {
  torch::manual_seed(8);
  const auto w = torch::randn({16, 256});
  const auto found = gptq(w, torch::eye(256), {.format = "nf4", .static_groups = true});
  const auto plain = quantize(w, {.format = "nf4"});
  CHECK((values(found) - w).norm().item<double>() <
        0.97 * (values(plain) - w).norm().item<double>());
  const auto zero = gptq(torch::zeros({2, 64}), torch::eye(64), {.format = "nf4"});
  CHECK(values(zero).abs().max().item<double>() == 0);
}

TEST_CASE("independent inputs of one size make GPTQ round to nearest") {
  torch::manual_seed(4);
  const auto w = torch::randn({9, 75});
  for (const int64_t bits : {4, 8})
    for (const bool symmetric : {false, true}) {
      const auto found =
          gptq(w, 3.0 * torch::eye(75), {.bits = bits, .group_size = 32, .symmetric = symmetric});
      // A symmetric grid puts the largest value between two codes; either is nearest.
      const auto error = (values(found) - w).abs(), plain = (rtn(w, bits, 32, symmetric) - w).abs();
      CHECK(torch::allclose(error, plain, 0, 1e-6));
      if (!symmetric) CHECK(torch::equal(values(found), rtn(w, bits, 32)));
    }
}

TEST_CASE("act-order stores the columns as it took them, static groups keep neighbours together") {
  torch::manual_seed(5);
  const auto x = inputs(300, 70), w = torch::randn({8, 70}), h = hessian(x);
  const auto found = gptq(w, h, {.group_size = 32, .act_order = true});
  REQUIRE(found.parts.size() == 5);
  const auto taken = h.diagonal().index_select(0, found.parts[4]);
  CHECK((taken.slice(0, 1) <= taken.slice(0, 0, 69)).all().item<bool>());
  CHECK(gptq(w, h, {.group_size = 32, .act_order = true, .static_groups = true}).parts.size() == 4);
  CHECK(gptq(w, h, {.group_size = -1, .act_order = true}).parts.size() == 4);
}

TEST_CASE("columns without inputs become zero and disturb no other") {
  torch::manual_seed(6);
  auto x = inputs(300, 32);
  x.slice(1, 5, 7).zero_();
  const auto w = torch::randn({8, 32}), h = hessian(x);
  for (const bool act : {false, true}) {
    const auto found = values(gptq(w, h, {.group_size = 16, .act_order = act}));
    CHECK(found.slice(1, 5, 7).abs().max().item<double>() == 0);
    CHECK(loss(x, w, found) < loss(x, w, rtn(w, 4, 16)));
  }
}

TEST_CASE("what GPTQ cannot work with is refused") {
  const auto w = torch::randn({4, 8}), h = torch::eye(8);
  const auto says = [](const char* text) { return doctest::Contains(text); };
  CHECK_THROWS_WITH_AS(gptq(w, torch::eye(7)), says("[8, 8], found [7, 7]"), budwood::Error);
  CHECK_THROWS_WITH_AS(gptq(w, h * NAN), says("Hessian holds values that are not finite"),
                       budwood::Error);
  CHECK_THROWS_WITH_AS(gptq(w * INFINITY, h), says("weight holds"), budwood::Error);
  CHECK_THROWS_WITH_AS(gptq(w, -h), says("more damping"), budwood::Error);
  CHECK_THROWS_WITH_AS(gptq(w, torch::ones({8, 8}), {.damping = 0}), says("damping 0"),
                       budwood::Error);
  CHECK_THROWS_WITH_AS(gptq(w, h, {.bits = 3}), says("3 bits"), budwood::Error);
  CHECK_THROWS_WITH_AS(gptq(w, h, {.format = "nf5"}), says("nf5"), budwood::Error);
  CHECK_THROWS_WITH_AS(gptq(w, h, {.format = "nf4", .group_size = 48}), says("block size 48"),
                       budwood::Error);
  CHECK_THROWS_WITH_AS(gptq(w, h, {.format = "nf4"}), says("do not divide rows of 8"),
                       budwood::Error);
  CHECK_THROWS_WITH_AS(gptq(w, h, {.format = "nf4", .act_order = true}), says("static_groups"),
                       budwood::Error);
  CHECK_THROWS_WITH_AS(gptq(w, h, {.double_quant = true}), says("nf4 and fp4"), budwood::Error);
  CHECK_THROWS_WITH_AS(gptq(w, h, {.group_size = 0}), says("group size 0"), budwood::Error);
}
