#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace budwood::io {

/// Element types of the safetensors format, under its names ("F32", "BF16", ...). The order is the
/// order in which the reference writer lays tensors out, wide types first.
enum class Dtype : uint8_t {
  u64,
  i64,
  f64,
  c64,
  f32,
  u32,
  i32,
  bf16,
  f16,
  u16,
  i16,
  f8_e5m2fnuz,
  f8_e4m3fnuz,
  f8_e8m0,
  f8_e4m3,
  f8_e5m2,
  i8,
  u8,
  f6_e3m2,
  f6_e2m3,
  f4,
  boolean,
};

/// The name on disk.
std::string_view dtype_name(Dtype dtype);
/// The type of a name on disk; nothing when there is none.
std::optional<Dtype> dtype_from_name(std::string_view name);
/// Bits of one element: 4, 6, 8, 16, 32 or 64.
uint32_t dtype_bits(Dtype dtype);
/// All names, for error messages: "U64, I64, ...".
std::string dtype_names();

/// a * b, or nothing when it does not fit 64 bits.
std::optional<uint64_t> checked_multiply(uint64_t a, uint64_t b);
/// Number of elements of a shape (1 for a scalar); nothing for a negative size or an overflow.
std::optional<uint64_t> element_count(std::span<const int64_t> shape);
/// Bytes of `count` elements; nothing for an overflow or bits that do not fill whole bytes.
std::optional<uint64_t> byte_count(Dtype dtype, uint64_t count);
/// "[2, 3]".
std::string shape_text(std::span<const int64_t> shape);

}  // namespace budwood::io
