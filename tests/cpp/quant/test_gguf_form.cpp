#include <budwood/quant/kernels/gguf_blocks.h>

#include "packed_reference.h"

using namespace budwood::quant;
using kernels::GgmlType;

namespace {

// Blocks of random bytes whose fp16 scales are small numbers.
at::Tensor random_blocks(GgmlType type, int64_t out, int64_t in) {
  auto blocks = torch::randint(0, 256, {out, kernels::row_bytes(type, in)}, at::kByte);
  const int64_t size = kernels::ggml_type_traits(type).block_bytes;
  auto each = blocks.view({-1, size});
  const auto scale = [&](int64_t at) {
    const auto value = (torch::rand({each.size(0), 1}) * 0.02 + 0.001).to(at::kHalf);
    each.slice(1, at, at + 2).copy_(value.view(at::kByte));
  };
  scale(type == GgmlType::q6_k ? 208 : 0);
  if (type == GgmlType::q4_1 || type == GgmlType::q5_1 || type == GgmlType::q4_k ||
      type == GgmlType::q5_k)
    scale(2);
  return blocks;
}

Weight packed(GgmlType type, int64_t out, int64_t in) {
  return Weight::from_parts({random_blocks(type, out, in)}, 16 + static_cast<int64_t>(type), out,
                            in);
}

}  // namespace

TEST_CASE(
    "a packed GGUF weight multiplies like its decoded blocks, in every type and ragged sizes") {
  torch::manual_seed(0);
  for (const auto type : {GgmlType::q4_0, GgmlType::q4_1, GgmlType::q5_0, GgmlType::q5_1,
                          GgmlType::q8_0, GgmlType::q4_k, GgmlType::q5_k, GgmlType::q6_k}) {
    CAPTURE(kernels::ggml_type_name(type));
    const int64_t block = kernels::ggml_type_traits(type).block, out = 37, in = 3 * block;
    const auto w = packed(type, out, in);
    auto values = at::empty({out, in}, at::kFloat);
    kernels::dequantize_row(type, w.parts[0].data_ptr(), values.data_ptr<float>(), out * in);
    check_products(w, values);
  }
}

TEST_CASE("a packed weight of many panels is multiplied whole") {
  torch::manual_seed(0);
  const auto w = packed(GgmlType::q4_0, 5001, 576);
  check_products(w, w.rows(0, w.out, at::kFloat));
}

TEST_CASE("blocks that do not fit a GGUF type and shape are refused") {
  const auto w = packed(GgmlType::q4_0, 4, 64);
  const auto bytes = w.parts[0];
  const auto refuse = [](std::vector<at::Tensor> parts, int64_t format, int64_t out, int64_t in) {
    CHECK_THROWS_AS(Weight::from_parts(std::move(parts), format, out, in), budwood::Error);
  };
  refuse({bytes}, 18, 5, 64);
  refuse({bytes}, 18, 4, 48);
  refuse({bytes}, 19, 4, 64);
  refuse({bytes, bytes}, 18, 4, 64);
  refuse({bytes.to(at::kChar)}, 18, 4, 64);
  refuse({bytes.t().contiguous().t()}, 18, 4, 64);
  refuse({bytes.slice(0, 0, 0)}, 18, 0, 64);
  CHECK_THROWS_WITH_AS(Weight::from_parts({bytes.to(at::kMeta)}, 18, 4, 64),
                       doctest::Contains("are on meta"), budwood::Error);
}
