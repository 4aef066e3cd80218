#include <budwood/quant/checkpoints/gptq.h>

#include "../packed_reference.h"

using namespace budwood::quant;

namespace {

at::Tensor words(std::vector<uint32_t> values, at::IntArrayRef shape) {
  std::vector<int32_t> bits(values.begin(), values.end());
  return torch::tensor(bits, at::kInt).view(shape);
}

// The case both layouts share: q[i, o] = (3 i + o) mod 16, z[o] = o + 4, scale[o] = (o + 1) / 16.
at::Tensor golden_weight() {
  const auto i = torch::arange(8).unsqueeze(0), o = torch::arange(8).unsqueeze(1);
  return ((3 * i + o).remainder(16) - (o + 4)).to(at::kFloat) * (o + 1).to(at::kFloat) / 16;
}
at::Tensor golden_scales() {
  return (torch::arange(1, 9).to(at::kHalf) / 16).view({1, 8});
}
at::Tensor golden_codes() {
  return words({0x52fc9630, 0x630da741, 0x741eb852, 0x852fc963, 0x9630da74, 0xa741eb85, 0xb852fc96,
                0xc9630da7},
               {1, 8});
}

// Fields of `bits` in int32 words along dimension 0, by the written rule.
at::Tensor pack_rows(const at::Tensor& fields, int64_t bits) {
  const int64_t per_word = 32 / bits;
  auto packed = torch::zeros({fields.size(0) / per_word, fields.size(1)}, at::kLong);
  for (int64_t i = 0; i < per_word; ++i)
    packed += fields.slice(0, i, fields.size(0), per_word).to(at::kLong) * (1L << bits * i);
  return torch::where(packed >= 1L << 31, packed - (1L << 32), packed).to(at::kInt);
}

struct Case {
  at::Tensor qweight, qzeros, scales, g_idx, values;
};

Case random_case(int64_t bits, int64_t out, int64_t in, int64_t size, bool v2, bool act_order) {
  const int64_t groups = (in + size - 1) / size, top = 1L << bits;
  const auto q = torch::randint(top, {in, out}), z = torch::randint(top, {groups, out});
  const auto scales = torch::rand({groups, out}).to(at::kHalf);
  auto g_idx = torch::arange(in).floor_divide(size).to(at::kInt);
  if (act_order) g_idx = g_idx.index_select(0, torch::randperm(in));
  const auto group = g_idx.to(at::kLong);
  const auto values =
      scales.to(at::kFloat).index_select(0, group) * (q - z.index_select(0, group)).to(at::kFloat);
  auto qzeros = pack_rows(z.t(), bits).t().contiguous();
  if (!v2) qzeros = qzeros - static_cast<int32_t>(bits == 4 ? 0x11111111 : 0x01010101);
  return {pack_rows(q, bits), qzeros, scales, g_idx, values.t().contiguous()};
}

}  // namespace

TEST_CASE("the golden GPTQ weight is read exactly, in both versions") {
  for (const bool v2 : {false, true}) {
    const auto zeros = words({v2 ? 0xba987654 : 0xa9876543}, {1, 1});
    const auto w = weight_from_gptq(golden_codes(), zeros, golden_scales(), {}, 4, 8, v2, 8, 8);
    CHECK(torch::equal(w.rows(0, 8, at::kFloat), golden_weight()));
    CHECK(torch::equal(golden_weight()[0], torch::tensor({-0.25, -0.0625, 0.125, 0.3125, 0.5,
                                                          0.6875, -0.125, 0.0625})));
  }
}

TEST_CASE("random GPTQ weights of 4 and 8 bits are read exactly, in any order of columns") {
  torch::manual_seed(0);
  for (const int64_t bits : {4, 8})
    for (const int64_t size : {16, 32, 48, -1})
      for (const bool v2 : {false, true})
        for (const bool act_order : {false, true}) {
          const int64_t out = 40, in = 96;
          const auto c = random_case(bits, out, in, size == -1 ? in : size, v2, act_order);
          const auto w =
              weight_from_gptq(c.qweight, c.qzeros, c.scales, c.g_idx, bits, size, v2, out, in);
          CHECK(torch::equal(w.rows(0, out, at::kFloat), c.values));
          CHECK(w.parts.size() == (act_order && size != -1 ? 5 : 4));
          if (size == 32) check_products(w, c.values);
          if (act_order) continue;
          const auto bare =
              weight_from_gptq(c.qweight, c.qzeros, c.scales, {}, bits, size, v2, out, in);
          CHECK(torch::equal(bare.rows(0, out, at::kFloat), c.values));
        }
}

TEST_CASE("GPTQ tensors that do not fit are refused by name") {
  const auto c = random_case(4, 8, 32, 16, false, true);
  const auto read = [&](Case given, int64_t bits = 4) {
    return weight_from_gptq(given.qweight, given.qzeros, given.scales, given.g_idx, bits, 16, false,
                            8, 32);
  };
  auto bad = c;
  bad.qweight = c.qweight.slice(0, 1);
  CHECK_THROWS_WITH_AS(read(bad), doctest::Contains("qweight is Int [3, 8]"), budwood::Error);
  bad = c;
  bad.qzeros = c.qzeros.to(at::kLong);
  CHECK_THROWS_WITH_AS(read(bad), doctest::Contains("qzeros is Long [2, 1]"), budwood::Error);
  bad = c;
  bad.scales = c.scales.clone().fill_(INFINITY);
  CHECK_THROWS_WITH_AS(read(bad), doctest::Contains("scales"), budwood::Error);
  bad = c;
  bad.g_idx = c.g_idx + 1;
  CHECK_THROWS_WITH_AS(read(bad), doctest::Contains("into group 1; wanted groups of 16"),
                       budwood::Error);
  CHECK_THROWS_WITH_AS(read(c, 3), doctest::Contains("3 bits"), budwood::Error);
}

TEST_CASE("a GPTQ quantization_config is read, and what Budwood cannot read is named") {
  const auto read = GptqConfig::from_json;
  auto config = read(R"({"quant_method": "gptq", "bits": 8, "group_size": -1, "desc_act": true,
                         "sym": false, "checkpoint_format": "gptq_v2", "damp_percent": 0.1})");
  CHECK(config.bits == 8);
  CHECK(config.group_size == -1);
  CHECK(config.desc_act);
  CHECK_FALSE(config.sym);
  CHECK(config.v2);
  config = read(R"({"bits": 4, "group_size": 128, "desc_act": false, "dynamic": {}})");
  CHECK_FALSE(config.v2);
  CHECK(config.group_size == 128);
  for (const auto& [text, said] : std::vector<std::pair<const char*, const char*>>{
           {R"({"bits": 3})", "bits is 3"},
           {R"({"bits": "4"})", "bits is \"4\"; wanted an integer"},
           {R"({"group_size": 0})", "group_size is 0"},
           {R"({"desc_act": 1})", "desc_act is 1; wanted true or false"},
           {R"({"quant_method": "awq"})", "quant_method is 'awq'"},
           {R"({"checkpoint_format": "marlin"})", "checkpoint_format is 'marlin'"},
           {R"({"pack_dtype": "int16"})", "pack_dtype is 'int16'"},
           {R"({"dynamic": {"-:layers.0": {}}})", "dynamic"},
           {R"([])", "not a JSON object"},
           {R"({"bits": )", "not a JSON object"}}) {
    CAPTURE(text);
    CHECK_THROWS_WITH_AS(read(text), doctest::Contains(said), budwood::Error);
  }
}
