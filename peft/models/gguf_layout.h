#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/peft/io/gguf_names.h>
#include <budwood/quant/kernels/ggml_type.h>
#include <budwood/quant/weight.h>

/// Row order and formats of tensors in GGUF files.
namespace budwood::models {

using io::gguf_name;
using io::gguf_place;
using io::kRopeDivisors;
using io::name_from_gguf;
using io::rotary_rows;
using io::row_in_gguf;

/// The rows of q and k of architecture "llama" (io/gguf_names.h) to transformers' order and back.
/// `rows` are those of whole heads, of any width, as values or as the bytes of blocks.
at::Tensor rows_from_gguf(const at::Tensor& rows, int64_t head_dim);
at::Tensor rows_to_gguf(const at::Tensor& rows, int64_t head_dim);

/// The form of a weight whose blocks are of this type.
constexpr quant::Format gguf_format(quant::kernels::GgmlType type) {
  return static_cast<quant::Format>(16 + static_cast<int64_t>(type));
}

}  // namespace budwood::models
