#include <budwood/peft/io/ggml_type.h>
#include <budwood/quant/error.h>
#include <doctest/doctest.h>

#include "temporary_folder.h"

using namespace budwood;
using namespace budwood::io;
using namespace budwood::io::testing;

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

TEST_CASE("a type that cannot be decoded is refused by name, with those that can") {
  require_decodable(GgmlType::q6_k, "w", "x.gguf");
  const auto text = message_of<Error>([] { require_decodable(GgmlType::iq2_xs, "w", "x.gguf"); });
  CHECK(contains(text, "x.gguf: tensor 'w' is of type IQ2_XS; supported are F32, F16, Q4_0"));
  CHECK(contains(text, "Q6_K, BF16"));
}
