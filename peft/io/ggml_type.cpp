#include <budwood/peft/io/ggml_type.h>
#include <budwood/peft/io/text.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <algorithm>

namespace budwood::io {
namespace {

constexpr GgmlTypeTraits kTypes[] = {
    {GgmlType::f32, "F32", 1, 4, true},
    {GgmlType::f16, "F16", 1, 2, true},
    {GgmlType::q4_0, "Q4_0", 32, 18, true},
    {GgmlType::q4_1, "Q4_1", 32, 20, true},
    {GgmlType::q5_0, "Q5_0", 32, 22, true},
    {GgmlType::q5_1, "Q5_1", 32, 24, true},
    {GgmlType::q8_0, "Q8_0", 32, 34, true},
    {GgmlType::q8_1, "Q8_1", 32, 40, false},
    {GgmlType::q2_k, "Q2_K", 256, 84, false},
    {GgmlType::q3_k, "Q3_K", 256, 110, false},
    {GgmlType::q4_k, "Q4_K", 256, 144, true},
    {GgmlType::q5_k, "Q5_K", 256, 176, true},
    {GgmlType::q6_k, "Q6_K", 256, 210, true},
    {GgmlType::q8_k, "Q8_K", 256, 292, false},
    {GgmlType::iq2_xxs, "IQ2_XXS", 256, 66, false},
    {GgmlType::iq2_xs, "IQ2_XS", 256, 74, false},
    {GgmlType::iq3_xxs, "IQ3_XXS", 256, 98, false},
    {GgmlType::iq1_s, "IQ1_S", 256, 50, false},
    {GgmlType::iq4_nl, "IQ4_NL", 32, 18, false},
    {GgmlType::iq3_s, "IQ3_S", 256, 110, false},
    {GgmlType::iq2_s, "IQ2_S", 256, 82, false},
    {GgmlType::iq4_xs, "IQ4_XS", 256, 136, false},
    {GgmlType::i8, "I8", 1, 1, false},
    {GgmlType::i16, "I16", 1, 2, false},
    {GgmlType::i32, "I32", 1, 4, false},
    {GgmlType::i64, "I64", 1, 8, false},
    {GgmlType::f64, "F64", 1, 8, false},
    {GgmlType::iq1_m, "IQ1_M", 256, 56, false},
    {GgmlType::bf16, "BF16", 1, 2, true},
    {GgmlType::tq1_0, "TQ1_0", 256, 54, false},
    {GgmlType::tq2_0, "TQ2_0", 256, 66, false},
    {GgmlType::mxfp4, "MXFP4", 32, 17, false},
    {GgmlType::nvfp4, "NVFP4", 64, 36, false},
    {GgmlType::q1_0, "Q1_0", 128, 18, false},
};

char upper(char c) {
  return c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
}

}  // namespace

const GgmlTypeTraits* ggml_type_traits(uint32_t id) {
  for (const auto& traits : kTypes)
    if (static_cast<uint32_t>(traits.type) == id) return &traits;
  return nullptr;
}

const GgmlTypeTraits& ggml_type_traits(GgmlType type) {
  const auto* traits = ggml_type_traits(static_cast<uint32_t>(type));
  if (!traits)
    throw Error("ggml_type_traits", fmt::format("{} is no ggml type", static_cast<uint32_t>(type)));
  return *traits;
}

std::optional<GgmlType> ggml_type_from_name(std::string_view name) {
  for (const auto& traits : kTypes)
    if (std::equal(name.begin(), name.end(), traits.name.begin(), traits.name.end(),
                   [](char a, char b) { return upper(a) == b; }))
      return traits.type;
  return std::nullopt;
}

std::string decodable_ggml_types() {
  std::string text;
  for (const auto& traits : kTypes)
    if (traits.decodable) text.append(text.empty() ? "" : ", ").append(traits.name);
  return text;
}

void require_decodable(GgmlType type, std::string_view tensor, std::string_view path) {
  const auto& traits = ggml_type_traits(type);
  if (!traits.decodable)
    throw Error("gguf", fmt::format("{}: tensor {} is of type {}; supported are {}", path,
                                    in_quotes(tensor), traits.name, decodable_ggml_types()));
}

}  // namespace budwood::io
