#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/quant/device_rows.h>
#include <budwood/quant/error.h>

namespace budwood::quant {
namespace {

using namespace kernels;

template <class T>
const T* pointer(const Weight& w, size_t part) {
  return w.parts[part].const_data_ptr<T>();
}

/// Where the device itself can read the number, else null.
const int64_t* size_on_device(const Weight& w, size_t part) {
  return w.parts[part].device() == w.parts[0].device() ? w.parts[part].const_data_ptr<int64_t>()
                                                       : nullptr;
}

Bnb4Rows bnb4(const Weight& w) {
  Bnb4Rows rows{.type = w.format == Format::nf4 ? Bnb4Type::nf4 : Bnb4Type::fp4,
                .rows = w.out,
                .cols = w.in,
                .block_size = bnb4_block_size(w.out * w.in, w.parts[1].numel()),
                .stated_block_size = size_on_device(w, 2),
                .codes = pointer<uint8_t>(w, 0)};
  if (w.parts.size() == 3) {
    rows.absmax = pointer<float>(w, 1);
  } else {
    rows.absmax_codes = pointer<uint8_t>(w, 1);
    rows.nested_absmax = pointer<float>(w, 3);
    rows.map = pointer<float>(w, 4);
    rows.offset = pointer<float>(w, 5);
  }
  return rows;
}

template <int kBits>
AffineRows<kBits> affine(const Weight& w) {
  AffineRows<kBits> rows{.rows = w.out,
                         .cols = w.in,
                         .groups = w.parts[1].numel() / w.out,
                         .codes = pointer<uint8_t>(w, 0),
                         .scales = pointer<float>(w, 1)};
  if (w.parts[3].is_cpu())
    rows.group_size = *w.parts[3].const_data_ptr<int64_t>();
  else
    rows.stated_size = size_on_device(w, 3);
  if (w.parts[2].scalar_type() == at::kByte)
    rows.zero_points = pointer<uint8_t>(w, 2);
  else
    rows.zeros = pointer<float>(w, 2);
  return rows;
}

template <GgmlType kType>
GgufRows<kType> gguf(const Weight& w) {
  return {.rows = w.out, .cols = w.in, .blocks = pointer<uint8_t>(w, 0)};
}

}  // namespace

int64_t bnb4_block_size(int64_t count, int64_t scales) {
  for (int64_t size = 32; size <= 4096; size *= 2)
    if (bnb4_blocks(count, size) == scales) return size;
  throw Error("weight", fmt::format("{} elements in blocks of a power of two from 32 to 4096 do "
                                    "not have {} scales",
                                    count, scales));
}

AnyRows device_rows(const Weight& w) {
  switch (w.format) {
    case Format::nf4:
    case Format::fp4:
      return bnb4(w);
    case Format::affine4:
      return affine<4>(w);
    case Format::affine8:
      return affine<8>(w);
    case Format::int8_rows:
      return Int8Rows{
          .rows = w.out, .cols = w.in, .codes = pointer<int8_t>(w, 0), .scb = pointer<float>(w, 1)};
    case Format::gguf_q4_0:
      return gguf<GgmlType::q4_0>(w);
    case Format::gguf_q4_1:
      return gguf<GgmlType::q4_1>(w);
    case Format::gguf_q5_0:
      return gguf<GgmlType::q5_0>(w);
    case Format::gguf_q5_1:
      return gguf<GgmlType::q5_1>(w);
    case Format::gguf_q8_0:
      return gguf<GgmlType::q8_0>(w);
    case Format::gguf_q4_k:
      return gguf<GgmlType::q4_k>(w);
    case Format::gguf_q5_k:
      return gguf<GgmlType::q5_k>(w);
    case Format::gguf_q6_k:
      return gguf<GgmlType::q6_k>(w);
    default:
      throw Error("weight",
                  fmt::format("a {} weight has no device form", form_of(w.format).name()));
  }
}

}  // namespace budwood::quant
