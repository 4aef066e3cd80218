#include <budwood/peft/io/gguf.h>
#include <budwood/peft/io/text.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <optional>
#include <type_traits>

namespace budwood::io {
namespace {

constexpr const char* kTypeNames[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                      "bool", "string", "array", "u64", "i64", "f64"};

[[noreturn]] void wrong_kind(const GgufFile& file, std::string_view key, const GgufValue& value,
                             std::string_view wanted) {
  throw Error("GgufFile",
              fmt::format("{}: the key {} is of type {}, {} is needed", file.path().string(),
                          in_quotes(key), gguf_type_name(value), wanted));
}

// The integer that a value holds, if it is one; as u64 it must not be negative.
template <typename To>
To integer_of(const GgufFile& file, std::string_view key, const GgufValue& value,
              std::string_view wanted) {
  return std::visit(
      [&](const auto& v) -> To {
        using T = std::decay_t<decltype(v)>;
        if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) {
          if (!std::in_range<To>(v))
            throw Error("GgufFile", fmt::format("{}: the key {} is {}, which does not fit {}",
                                                file.path().string(), in_quotes(key), v, wanted));
          return static_cast<To>(v);
        } else {
          wrong_kind(file, key, value, wanted);
        }
      },
      value);
}

template <typename T>
const T& value_of(const GgufFile& file, std::string_view key, const GgufValue& value,
                  std::string_view wanted) {
  if (const T* held = std::get_if<T>(&value)) return *held;
  wrong_kind(file, key, value, wanted);
}

template <typename T>
const std::vector<T>& elements_of(const GgufFile& file, std::string_view key,
                                  const GgufValue& value, std::string_view wanted) {
  const auto& array = value_of<GgufArray>(file, key, value, wanted);
  if (const auto* held = std::get_if<std::vector<T>>(&array)) return *held;
  wrong_kind(file, key, value, wanted);
}

}  // namespace

std::string gguf_type_name(const GgufValue& value) {
  if (const auto* array = std::get_if<GgufArray>(&value))
    return std::string("array of ") + kTypeNames[array->index()];
  return kTypeNames[value.index()];
}

const GgufValue* GgufFile::find_value(std::string_view key) const {
  const auto it = keys_.find(std::string(key));
  return it == keys_.end() ? nullptr : &metadata_[it->second].second;
}

const GgufValue& GgufFile::value(std::string_view key) const {
  const GgufValue* found = find_value(key);
  if (!found)
    throw Error("GgufFile", fmt::format("{} has no key {}", path().string(), in_quotes(key)));
  return *found;
}

uint32_t GgufFile::get_u32(std::string_view key) const {
  return integer_of<uint32_t>(*this, key, value(key), "u32");
}

uint64_t GgufFile::get_u64(std::string_view key) const {
  return integer_of<uint64_t>(*this, key, value(key), "u64");
}

float GgufFile::get_f32(std::string_view key) const {
  const GgufValue& found = value(key);
  if (const auto* wide = std::get_if<double>(&found)) return static_cast<float>(*wide);
  return value_of<float>(*this, key, found, "f32");
}

bool GgufFile::get_bool(std::string_view key) const {
  return value_of<bool>(*this, key, value(key), "bool");
}

const std::string& GgufFile::get_string(std::string_view key) const {
  return value_of<std::string>(*this, key, value(key), "string");
}

const std::vector<std::string>& GgufFile::get_strings(std::string_view key) const {
  return elements_of<std::string>(*this, key, value(key), "array of string");
}

const std::vector<float>& GgufFile::get_floats(std::string_view key) const {
  return elements_of<float>(*this, key, value(key), "array of f32");
}

std::vector<int64_t> GgufFile::get_integers(std::string_view key) const {
  const GgufValue& found = value(key);
  const auto& array = value_of<GgufArray>(*this, key, found, "array of integers");
  return std::visit(
      [&](const auto& held) -> std::vector<int64_t> {
        using Vector = std::decay_t<decltype(held)>;
        if constexpr (!std::is_same_v<Vector, std::monostate>) {
          using T = typename Vector::value_type;
          if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) {
            std::vector<int64_t> values;
            values.reserve(held.size());
            for (const T v : held) {
              if (!std::in_range<int64_t>(v))
                throw Error("GgufFile",
                            fmt::format("{}: the key {} holds {}, which does not fit 64 bits",
                                        path().string(), in_quotes(key), v));
              values.push_back(static_cast<int64_t>(v));
            }
            return values;
          }
        }
        wrong_kind(*this, key, found, "array of integers");
      },
      array);
}

uint32_t GgufFile::get_u32(std::string_view key, uint32_t absent) const {
  return has(key) ? get_u32(key) : absent;
}

float GgufFile::get_f32(std::string_view key, float absent) const {
  return has(key) ? get_f32(key) : absent;
}

bool GgufFile::get_bool(std::string_view key, bool absent) const {
  return has(key) ? get_bool(key) : absent;
}

std::string GgufFile::get_string(std::string_view key, const std::string& absent) const {
  return has(key) ? get_string(key) : absent;
}

}  // namespace budwood::io
