#include <budwood/quant/error.h>
#include <budwood/quant/kernels/ggml_type.h>
#include <doctest/doctest.h>

#include <string>

using namespace budwood;
using namespace budwood::quant::kernels;

TEST_CASE("block sizes are those of ggml") {
  const auto check = [](uint32_t id, const char* name, uint32_t block, uint32_t bytes) {
    const auto* traits = ggml_type_traits(id);
    REQUIRE(traits);
    CHECK(traits->name == name);
    CHECK(traits->block == block);
    CHECK(traits->block_bytes == bytes);
    CHECK(ggml_type_from_name(name) == traits->type);
  };
  // The sizes as ggml composes them: fp16 scales, then packed bits.
  check(0, "F32", 1, 4);
  check(1, "F16", 1, 2);
  check(30, "BF16", 1, 2);
  check(2, "Q4_0", 32, 2 + 16);
  check(3, "Q4_1", 32, 2 + 2 + 16);
  check(6, "Q5_0", 32, 2 + 4 + 16);
  check(7, "Q5_1", 32, 2 + 2 + 4 + 16);
  check(8, "Q8_0", 32, 2 + 32);
  check(10, "Q2_K", 256, 2 + 2 + 256 / 16 + 256 / 4);
  check(11, "Q3_K", 256, 2 + 256 / 4 + 256 / 8 + 12);
  check(12, "Q4_K", 256, 2 + 2 + 256 / 2 + 12);
  check(13, "Q5_K", 256, 2 + 2 + 256 / 2 + 256 / 8 + 12);
  check(14, "Q6_K", 256, 2 + 256 / 2 + 256 / 4 + 256 / 16);
  check(15, "Q8_K", 256, 4 + 256 + 256 / 8);
  check(20, "IQ4_NL", 32, 2 + 16);
  check(29, "IQ1_M", 256, 256 / 8 + 256 / 16 + 256 / 32);
  check(39, "MXFP4", 32, 1 + 16);
  for (const uint32_t id : {4u, 5u, 31u, 33u, 36u, 42u, 0xffffffffu}) CHECK(!ggml_type_traits(id));
  CHECK(ggml_type_from_name("q4_k") == GgmlType::q4_k);
  CHECK(!ggml_type_from_name("Q9_K"));
}

TEST_CASE("every number has a name, and the types say what Budwood does with them") {
  CHECK(ggml_type_name(30) == "BF16");
  CHECK(ggml_type_name(40) == "NVFP4");
  CHECK(ggml_type_name(4) == "unknown");
  CHECK(ggml_type_name(1000) == "unknown");
  CHECK_THROWS_AS(ggml_type_traits(static_cast<GgmlType>(5)), Error);
  CHECK(decodable_ggml_types() == "F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, BF16");
  CHECK(writable_ggml_types() == "F32, F16, Q4_0, Q4_1, Q8_0, BF16");
}
