#include <budwood/peft/io/dtype.h>

#include <array>

namespace budwood::io {
namespace {

struct Entry {
  std::string_view name;
  uint32_t bits;
};

// Indexed by Dtype.
constexpr std::array<Entry, 22> kTypes = {{
    {"U64", 64},    {"I64", 64},        {"F64", 64},        {"C64", 64},    {"F32", 32},
    {"U32", 32},    {"I32", 32},        {"BF16", 16},       {"F16", 16},    {"U16", 16},
    {"I16", 16},    {"F8_E5M2FNUZ", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E8M0", 8}, {"F8_E4M3", 8},
    {"F8_E5M2", 8}, {"I8", 8},          {"U8", 8},          {"F6_E3M2", 6}, {"F6_E2M3", 6},
    {"F4", 4},      {"BOOL", 8},
}};

}  // namespace

std::string_view dtype_name(Dtype dtype) {
  return kTypes[static_cast<size_t>(dtype)].name;
}

uint32_t dtype_bits(Dtype dtype) {
  return kTypes[static_cast<size_t>(dtype)].bits;
}

std::optional<Dtype> dtype_from_name(std::string_view name) {
  for (size_t i = 0; i < kTypes.size(); ++i)
    if (kTypes[i].name == name) return static_cast<Dtype>(i);
  return std::nullopt;
}

std::string dtype_names() {
  std::string text;
  for (const auto& type : kTypes) text.append(text.empty() ? "" : ", ").append(type.name);
  return text;
}

std::optional<uint64_t> checked_multiply(uint64_t a, uint64_t b) {
  uint64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) return std::nullopt;
  return product;
}

std::optional<uint64_t> element_count(std::span<const int64_t> shape) {
  uint64_t count = 1;
  for (const int64_t size : shape) {
    if (size < 0) return std::nullopt;
    const auto product = checked_multiply(count, static_cast<uint64_t>(size));
    if (!product) return std::nullopt;
    count = *product;
  }
  return count;
}

std::optional<uint64_t> byte_count(Dtype dtype, uint64_t count) {
  const auto bits = checked_multiply(count, dtype_bits(dtype));
  if (!bits || *bits % 8 != 0) return std::nullopt;
  return *bits / 8;
}

std::string shape_text(std::span<const int64_t> shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace budwood::io
