#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/quant/kernels/ggml_type.h>
#include <budwood/quant/weight.h>
#include <string>

/// Names, row order and formats of tensors in GGUF files.
namespace budwood::models {

/// "model.layers.3.mlp.up_proj.weight" -> "blk.3.ffn_up.weight"; throws for a name GGUF has not.
std::string gguf_name(const std::string& name);

/// Files of architecture "llama" rotate neighbours (2i, 2i + 1) of a head, transformers halves
/// (i, i + d/2): the rows of q and k are permuted inside each head. `rows` are those of whole
/// heads, of any width, as values or as the bytes of blocks.
at::Tensor rows_from_gguf(const at::Tensor& rows, int64_t head_dim);
at::Tensor rows_to_gguf(const at::Tensor& rows, int64_t head_dim);

/// The form of a weight whose blocks are of this type.
constexpr quant::Format gguf_format(quant::kernels::GgmlType type) {
  return static_cast<quant::Format>(16 + static_cast<int64_t>(type));
}

/// Whether a tensor's rows are permuted in files of architecture "llama"; name is transformers'.
bool rotary_rows(const std::string& name);

}  // namespace budwood::models
