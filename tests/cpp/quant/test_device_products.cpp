#include <ATen/ATen.h>

#include <budwood/quant/device_products.h>
#include <budwood/quant/device_rows.h>
#include <budwood/quant/kernels/bnb4.h>
#include <budwood/quant/kernels/gguf_blocks.h>
#include <budwood/quant/quantize.h>
#include <limits>

#include "kernels/device/device_rows.h"
#include "packed_reference.h"

using namespace budwood::quant;

namespace {

kernels::FloatType float_type(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat      ? kernels::FloatType::fp32
         : t.scalar_type() == at::kBFloat16 ? kernels::FloatType::bf16
                                            : kernels::FloatType::fp16;
}

// A device whose threads run on the host, one after the other: all of CUDA's path but its launches.
class HostProducts final : public DeviceProducts {
 public:
  std::optional<int64_t> encode_4bit(const at::Tensor& w, Format format, int64_t block_size,
                                     at::Tensor& codes, at::Tensor& absmax) const override {
    const auto type = format == Format::nf4 ? kernels::Bnb4Type::nf4 : kernels::Bnb4Type::fp4;
    const int64_t bad = kernels::encode_on_host(
        {type, {w.const_data_ptr(), float_type(w)}, w.numel(), block_size},
        codes.mutable_data_ptr<uint8_t>(), absmax.mutable_data_ptr<float>());
    return bad < 0 ? std::nullopt : std::optional(bad);
  }

 protected:
  void decode(const Weight& w, int64_t begin, const at::Tensor& ids,
              at::Tensor& target) const override {
    REQUIRE(target.is_contiguous());
    std::visit(
        [&](const auto& rows) {
          REQUIRE(kernels::decode_on_host(rows, begin, target.size(0),
                                          ids.defined() ? ids.const_data_ptr<int64_t>() : nullptr,
                                          {target.mutable_data_ptr(), float_type(target)}));
        },
        device_rows(w));
  }

  void multiply_few(const Weight& w, const at::Tensor& x, at::Tensor& y) const override {
    REQUIRE(x.is_contiguous());
    std::visit(
        [&](const auto& rows) {
          REQUIRE(kernels::multiply_on_host(rows, {x.const_data_ptr(), float_type(x)},
                                            static_cast<int>(x.size(0)),
                                            {y.mutable_data_ptr(), float_type(y)}));
        },
        device_rows(w));
  }
};

// The device's products are those of the CPU's dequantised matrix.
void check_device(const Weight& w) {
  const HostProducts device;
  const auto values = w.rows(0, w.out, at::kFloat);
  const auto exact = values.to(at::kDouble);
  CHECK(torch::equal(device.rows(w, 0, w.out, at::kFloat), values));
  CHECK(torch::equal(device.rows(w, w.out / 2, w.out, at::kDouble), exact.slice(0, w.out / 2)));
  CHECK(torch::equal(device.rows(w, 1, 2, at::kBFloat16), values.slice(0, 1, 2).to(at::kBFloat16)));
  CHECK((device.rows(w, 1, 1, at::kHalf).sizes() == at::IntArrayRef({0, w.in})));
  const auto ids = torch::tensor({{0L, w.out - 1}, {w.out / 2, 0L}}, at::kLong);
  CHECK(torch::equal(device.gather(w, ids.t(), at::kHalf), w.gather(ids.t(), at::kHalf)));
  CHECK_THROWS_WITH_AS(device.rows(w, 0, 1, at::kLong), doctest::Contains("Long"), budwood::Error);

  for (const int64_t tokens : {1, 3, 8, 9, 40}) {
    const auto x = torch::randn({w.in, tokens}).t(), g = torch::randn({tokens, w.out});
    for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
      const double bound = type == at::kDouble ? 1e-13 : type == at::kFloat ? 1e-6 : 8e-3;
      const auto typed_x = x.to(type), typed_g = g.to(type);
      const auto y = device.linear(w, typed_x), dx = device.backward_input(w, typed_g);
      CHECK((y.scalar_type() == type));
      CHECK((dx.scalar_type() == type));
      CHECK(distance(y, typed_x.to(at::kDouble).matmul(exact.t())) < bound);
      CHECK(distance(dx, typed_g.to(at::kDouble).matmul(exact)) < bound);
    }
  }
  CHECK((device.linear(w, torch::randn({2, 0, w.in})).sizes() == at::IntArrayRef({2, 0, w.out})));
  CHECK((device.linear(w, torch::randn({w.in})).sizes() == at::IntArrayRef({w.out})));
  CHECK((device.backward_input(w, torch::randn({2, 0, w.out})).sizes() ==
         at::IntArrayRef({2, 0, w.in})));
}

}  // namespace

TEST_CASE("a device's path multiplies every quantised form like the CPU's matrix") {
  torch::manual_seed(0);
  for (const char* format : {"nf4", "fp4", "int8", "int4", "affine8"})
    for (const auto& [out, in, size] :
         std::vector<std::array<int64_t, 3>>{{37, 192, 64}, {21, 75, 32}, {40, 130, 64}}) {
      CAPTURE(format);
      CAPTURE(in);
      check_device(quantize(torch::randn({out, in}), {.format = format, .block_size = size}));
    }
  check_device(quantize(torch::randn({300, 192}), {.format = "nf4", .double_quant = true}));
  auto w = quantize(torch::randn({12, 96}), {.format = "int4", .block_size = 32});
  w.parts[2] = w.parts[2].to(at::kFloat) + 0.25;
  check_device(w);
}

TEST_CASE("a device's path multiplies GGUF blocks like the CPU's matrix") {
  torch::manual_seed(0);
  for (const auto type :
       {Format::gguf_q4_0, Format::gguf_q4_1, Format::gguf_q5_0, Format::gguf_q5_1,
        Format::gguf_q8_0, Format::gguf_q4_k, Format::gguf_q5_k, Format::gguf_q6_k}) {
    const auto ggml = static_cast<kernels::GgmlType>(static_cast<int64_t>(type) - 16);
    CAPTURE(kernels::ggml_type_name(ggml));
    const auto& traits = kernels::ggml_type_traits(ggml);
    const int64_t out = 11, in = 512, stride = traits.block_bytes;
    auto blocks = torch::randint(0, 256, {out * in / traits.block, stride}, at::kByte);
    // High bytes of the fp16 scales: 0.125 to 0.5.
    if (type == Format::gguf_q6_k)
      blocks.select(1, 209).fill_(0x30);
    else
      blocks.select(1, 1).fill_(0x30);
    if (type != Format::gguf_q6_k) blocks.select(1, 3).fill_(0x30);
    check_device(Weight::from_parts({blocks.view({out, -1})}, static_cast<int64_t>(type), out, in));
  }
}

TEST_CASE("a weight of several panels is multiplied whole on a device") {
  torch::manual_seed(0);
  // 300 rows of 256 KiB in fp32: more than one panel.
  const auto w = quantize(torch::randn({300, 1 << 16}), {.format = "int8"});
  const HostProducts device;
  const auto values = w.rows(0, w.out, at::kFloat);
  const auto x = torch::randn({9, w.in}), g = torch::randn({2, w.out});
  CHECK(distance(device.linear(w, x), x.matmul(values.t())) < 1e-5);
  CHECK(distance(device.backward_input(w, g), g.matmul(values)) < 1e-5);
  const auto half = g.to(at::kBFloat16);
  CHECK(distance(device.backward_input(w, half), half.to(at::kFloat).matmul(values)) < 8e-3);
}

TEST_CASE("a device quantises to the CPU's bytes and finds what is not finite") {
  torch::manual_seed(0);
  const HostProducts device;
  for (const auto format : {Format::nf4, Format::fp4})
    for (const auto type : {at::kFloat, at::kBFloat16, at::kHalf}) {
      auto plain = torch::randn({70, 33}).to(type);
      const auto w = quantize(plain, {.format = form_of(format).name()});
      auto codes = at::empty_like(w.parts[0]), absmax = at::empty_like(w.parts[1]);
      CHECK_FALSE(device.encode_4bit(plain, format, 64, codes, absmax).has_value());
      CHECK(torch::equal(codes, w.parts[0]));
      CHECK(torch::equal(absmax, w.parts[1]));
      plain[3][5] = std::numeric_limits<float>::infinity();
      CHECK(device.encode_4bit(plain, format, 64, codes, absmax) == 3 * 33 + 5);
    }
}

TEST_CASE("the block size of a 4-bit weight follows from its number of scales") {
  for (int64_t size = 32; size <= 4096; size *= 2)
    for (const int64_t count : {1L, 31L, 33L, 5000L, 9999L, 1L << 20}) {
      const int64_t scales = kernels::bnb4_blocks(count, size);
      const int64_t found = bnb4_block_size(count, scales);
      CHECK((found == size || (scales == 1 && count <= found)));
    }
  CHECK_THROWS_AS(bnb4_block_size(100, 3), budwood::Error);
}

TEST_CASE("packed parts on a device without products are refused by name") {
  const auto w = quantize(torch::randn({6, 64}), {.format = "nf4"});
  auto moved = w;
  for (auto& part : moved.parts) part = part.to(at::kMeta);
  CHECK_THROWS_WITH_AS(Weight::from_parts(moved.parts, 3, 6, 64), doctest::Contains("are on meta"),
                       budwood::Error);
  CHECK_THROWS_AS(Weight::from_parts(with_part(w, 1, moved.parts[1]).parts, 3, 6, 64),
                  budwood::Error);
  CHECK_THROWS_WITH_AS(quantize(torch::randn({6, 64}, at::kMeta)), doctest::Contains("on meta"),
                       budwood::Error);
  CHECK_THROWS_AS(device_rows(Weight::dense(torch::randn({2, 2}))), budwood::Error);
  CHECK(packed_devices().at(0) == "cpu");
  CHECK(packed_devices().size() == (device_products(at::kCUDA) ? 2 : 1));
}
