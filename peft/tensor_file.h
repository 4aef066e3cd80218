#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/peft/io/safetensors.h>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

/// Torch tensors in safetensors files.
namespace budwood {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

/// torch's dtype of a stored one; throws Error for types torch has no tensor for (F4, F6).
at::ScalarType scalar_type(io::Dtype dtype);
/// The dtype on disk of a torch dtype.
io::Dtype stored_dtype(at::ScalarType type);
/// "float32", "bfloat16", "float16" both ways.
at::ScalarType scalar_type_of(const std::string& name);
std::string dtype_text(at::ScalarType type);

/// A view of the mapped file, copied only where the data is not aligned to its type. The view keeps
/// the mapping alive; writing to it does not reach the file.
at::Tensor as_tensor(const io::TensorInfo& info);

/// Writes tensors whole or not at all.
void write_tensors(const std::filesystem::path& path, const NamedTensors& tensors,
                   const io::Metadata& metadata = {{"format", "pt"}});

/// The tensors of a file that torch.save made of a plain dictionary. Nothing in it is executed;
/// what is no named tensor is an Error.
NamedTensors read_pickle(const std::filesystem::path& path);

}  // namespace budwood
