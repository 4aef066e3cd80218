#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace budwood::quant::kernels {

/// Element types of ggml, under their numbers in GGUF files. This is all that is known of types
/// which cannot be decoded; gguf_blocks.h decodes and encodes the others.
enum class GgmlType : uint32_t {
  f32 = 0,
  f16 = 1,
  q4_0 = 2,
  q4_1 = 3,
  q5_0 = 6,
  q5_1 = 7,
  q8_0 = 8,
  q8_1 = 9,
  q2_k = 10,
  q3_k = 11,
  q4_k = 12,
  q5_k = 13,
  q6_k = 14,
  q8_k = 15,
  iq2_xxs = 16,
  iq2_xs = 17,
  iq3_xxs = 18,
  iq1_s = 19,
  iq4_nl = 20,
  iq3_s = 21,
  iq2_s = 22,
  iq4_xs = 23,
  i8 = 24,
  i16 = 25,
  i32 = 26,
  i64 = 27,
  f64 = 28,
  iq1_m = 29,
  bf16 = 30,
  tq1_0 = 34,
  tq2_0 = 35,
  mxfp4 = 39,
  nvfp4 = 40,
  q1_0 = 41,
};

/// How a type stores elements: blocks of `block` elements in `block_bytes` bytes.
struct GgmlTypeTraits {
  GgmlType type;
  std::string_view name;  ///< as ggml writes it: "Q4_K", "F16"
  uint32_t block;
  uint32_t block_bytes;
  bool decodable;  ///< whether Budwood turns its blocks into numbers
  bool writable;   ///< whether it turns numbers into blocks
};

/// The traits of a number found in a file; null for numbers that name no type.
const GgmlTypeTraits* ggml_type_traits(uint32_t id);
const GgmlTypeTraits& ggml_type_traits(GgmlType type);
/// The type of a name; letter case does not matter.
std::optional<GgmlType> ggml_type_from_name(std::string_view name);
/// The name of any number; "unknown" for those that name no type.
std::string_view ggml_type_name(uint32_t id);
inline std::string_view ggml_type_name(GgmlType type) {
  return ggml_type_name(static_cast<uint32_t>(type));
}
/// Names of the types that pass: "F32, F16, ...".
std::string decodable_ggml_types();
std::string writable_ggml_types();

}  // namespace budwood::quant::kernels
