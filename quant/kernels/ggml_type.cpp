#include <budwood/quant/error.h>
#include <budwood/quant/kernels/ggml_type.h>
#include <fmt/format.h>

#include <algorithm>

namespace budwood::quant::kernels {
namespace {

constexpr GgmlTypeTraits kTypes[] = {
    {GgmlType::f32, "F32", 1, 4, true, true},
    {GgmlType::f16, "F16", 1, 2, true, true},
    {GgmlType::q4_0, "Q4_0", 32, 18, true, true},
    {GgmlType::q4_1, "Q4_1", 32, 20, true, true},
    {GgmlType::q5_0, "Q5_0", 32, 22, true, false},
    {GgmlType::q5_1, "Q5_1", 32, 24, true, false},
    {GgmlType::q8_0, "Q8_0", 32, 34, true, true},
    {GgmlType::q8_1, "Q8_1", 32, 40, false, false},
    {GgmlType::q2_k, "Q2_K", 256, 84, false, false},
    {GgmlType::q3_k, "Q3_K", 256, 110, false, false},
    {GgmlType::q4_k, "Q4_K", 256, 144, true, false},
    {GgmlType::q5_k, "Q5_K", 256, 176, true, false},
    {GgmlType::q6_k, "Q6_K", 256, 210, true, false},
    {GgmlType::q8_k, "Q8_K", 256, 292, false, false},
    {GgmlType::iq2_xxs, "IQ2_XXS", 256, 66, false, false},
    {GgmlType::iq2_xs, "IQ2_XS", 256, 74, false, false},
    {GgmlType::iq3_xxs, "IQ3_XXS", 256, 98, false, false},
    {GgmlType::iq1_s, "IQ1_S", 256, 50, false, false},
    {GgmlType::iq4_nl, "IQ4_NL", 32, 18, false, false},
    {GgmlType::iq3_s, "IQ3_S", 256, 110, false, false},
    {GgmlType::iq2_s, "IQ2_S", 256, 82, false, false},
    {GgmlType::iq4_xs, "IQ4_XS", 256, 136, false, false},
    {GgmlType::i8, "I8", 1, 1, false, false},
    {GgmlType::i16, "I16", 1, 2, false, false},
    {GgmlType::i32, "I32", 1, 4, false, false},
    {GgmlType::i64, "I64", 1, 8, false, false},
    {GgmlType::f64, "F64", 1, 8, false, false},
    {GgmlType::iq1_m, "IQ1_M", 256, 56, false, false},
    {GgmlType::bf16, "BF16", 1, 2, true, true},
    {GgmlType::tq1_0, "TQ1_0", 256, 54, false, false},
    {GgmlType::tq2_0, "TQ2_0", 256, 66, false, false},
    {GgmlType::mxfp4, "MXFP4", 32, 17, false, false},
    {GgmlType::nvfp4, "NVFP4", 64, 36, false, false},
    {GgmlType::q1_0, "Q1_0", 128, 18, false, false},
};

char upper(char c) {
  return c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
}

std::string names_where(bool GgmlTypeTraits::*holds) {
  std::string text;
  for (const auto& traits : kTypes)
    if (traits.*holds) text.append(text.empty() ? "" : ", ").append(traits.name);
  return text;
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

std::string_view ggml_type_name(uint32_t id) {
  const auto* traits = ggml_type_traits(id);
  return traits ? traits->name : "unknown";
}

std::string decodable_ggml_types() {
  return names_where(&GgmlTypeTraits::decodable);
}

std::string writable_ggml_types() {
  return names_where(&GgmlTypeTraits::writable);
}

}  // namespace budwood::quant::kernels
