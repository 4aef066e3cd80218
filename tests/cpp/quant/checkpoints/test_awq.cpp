#include <budwood/quant/checkpoints/awq.h>

#include "../packed_reference.h"

using namespace budwood::quant;

namespace {

// Columns 8k + {0, 2, 4, 6, 1, 3, 5, 7} in the nibbles of word k, lowest first.
at::Tensor pack_columns(const at::Tensor& codes) {
  const std::array<int64_t, 8> order = {0, 2, 4, 6, 1, 3, 5, 7};
  const auto fields = codes.view({codes.size(0), -1, 8});
  auto packed = torch::zeros({codes.size(0), codes.size(1) / 8}, at::kLong);
  for (size_t i = 0; i < 8; ++i) packed += fields.select(2, order[i]) * (1L << 4 * i);
  return torch::where(packed >= 1L << 31, packed - (1L << 32), packed).to(at::kInt);
}

at::Tensor words(std::vector<uint32_t> values, at::IntArrayRef shape) {
  std::vector<int32_t> bits(values.begin(), values.end());
  return torch::tensor(bits, at::kInt).view(shape);
}

}  // namespace

TEST_CASE("the golden AWQ weight is read exactly") {
  const auto qweight = words({0x75316420, 0xa8649753, 0xdb97ca86, 0x0ecafdb9, 0x31fd20ec,
                              0x6420531f, 0x97538642, 0xca86b975},
                             {8, 1});
  const auto scales = (torch::arange(1, 9).to(at::kHalf) / 16).view({1, 8});
  const auto w = weight_from_awq(qweight, words({0xb975a864}, {1, 1}), scales, 4, 8, 8, 8);
  const auto rows = w.rows(0, 8, at::kFloat);
  CHECK(torch::equal(rows[0],
                     torch::tensor({-0.25, -0.0625, 0.125, 0.3125, 0.5, 0.6875, -0.125, 0.0625})));
  CHECK(torch::equal(rows[7], torch::tensor({-2.0, -0.5, 1.0, -5.5, -4.0, -2.5, -1.0, 0.5})));
}

TEST_CASE("random AWQ weights are read exactly") {
  torch::manual_seed(0);
  for (const auto& [out, in, size] :
       std::vector<std::array<int64_t, 3>>{{8, 32, 32}, {40, 96, 16}, {264, 64, 64}, {16, 15, 5}}) {
    const auto q = torch::randint(16, {in, out}), z = torch::randint(16, {in / size, out});
    const auto scales = torch::rand({in / size, out}).to(at::kHalf);
    const auto w = weight_from_awq(pack_columns(q), pack_columns(z), scales, 4, size, out, in);
    const auto values = (scales.to(at::kFloat).repeat_interleave(size, 0) *
                         (q - z.repeat_interleave(size, 0)).to(at::kFloat))
                            .t()
                            .contiguous();
    CHECK(torch::equal(w.rows(0, out, at::kFloat), values));
    check_refused(with_part(w, 1, w.parts[1].slice(0, 1).contiguous()));
  }
}

TEST_CASE("AWQ tensors that do not fit are refused by name") {
  const auto q = torch::zeros({32, 1}, at::kInt), z = torch::zeros({2, 1}, at::kInt);
  const auto s = torch::ones({2, 8}, at::kHalf);
  const auto says = [](const char* text) { return doctest::Contains(text); };
  CHECK_THROWS_WITH_AS(weight_from_awq(q.slice(0, 1), z, s, 4, 16, 8, 32),
                       says("qweight is Int [31, 1]"), budwood::Error);
  CHECK_THROWS_WITH_AS(weight_from_awq(q, z.t(), s, 4, 16, 8, 32), says("qzeros is Int [1, 2]"),
                       budwood::Error);
  CHECK_THROWS_WITH_AS(weight_from_awq(q, z, s.to(at::kInt), 4, 16, 8, 32), says("scales is Int"),
                       budwood::Error);
  CHECK_THROWS_WITH_AS(weight_from_awq(q, z, s, 8, 16, 8, 32), says("8 bits"), budwood::Error);
  CHECK_THROWS_WITH_AS(weight_from_awq(q, z, s, 4, 24, 8, 32), says("groups of 24"),
                       budwood::Error);
}

TEST_CASE("an AWQ quantization_config is read, and what Budwood cannot read is named") {
  const auto read = AwqConfig::from_json;
  auto config = read(R"({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": true,
                         "version": "gemm", "modules_to_not_convert": ["lm_head"]})");
  CHECK(config.group_size == 64);
  CHECK((config.modules_to_not_convert == std::vector<std::string>{"lm_head"}));
  config = read(R"({"w_bit": 4, "q_group_size": 32, "version": "GEMM",
                    "modules_to_not_convert": null})");
  CHECK(config.group_size == 32);
  for (const auto& [text, said] : std::vector<std::pair<const char*, const char*>>{
           {R"({"bits": 8})", "bits is 8"},
           {R"({"group_size": -1})", "group_size is -1"},
           {R"({"zero_point": false})", "zero_point is false"},
           {R"({"version": "gemv"})", "version is 'gemv'"},
           {R"({"version": "marlin"})", "version is 'marlin'"},
           {R"({"quant_method": "gptq"})", "quant_method is 'gptq'"},
           {R"({"modules_to_not_convert": [1]})", "modules_to_not_convert"}}) {
    CAPTURE(text);
    CHECK_THROWS_WITH_AS(read(text), doctest::Contains(said), budwood::Error);
  }
}
