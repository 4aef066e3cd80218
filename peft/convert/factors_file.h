#pragma once

#include <budwood/peft/io/safetensors.h>
#include <budwood/peft/merge/fold_term.h>

#include <span>
#include <string>
#include <utility>
#include <vector>

namespace budwood {

/// Named arrays as F32 tensors of a safetensors file.
inline void write_factors(const std::filesystem::path& path,
                          const std::vector<std::pair<std::string, FloatArray>>& arrays,
                          const io::Metadata& metadata) {
  std::vector<io::TensorData> tensors;
  for (const auto& [name, array] : arrays)
    tensors.push_back({{name, io::Dtype::f32, array.shape},
                       std::as_bytes(std::span(array.values.data(), array.values.size()))});
  io::write_safetensors(path, tensors, metadata);
}

}  // namespace budwood
