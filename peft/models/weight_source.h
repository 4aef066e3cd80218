#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/quant/weight.h>
#include <string>
#include <vector>

namespace budwood::models {

/// Where a model's weights come from, under transformers' tensor names
/// ("model.layers.0.self_attn.q_proj.weight"). A wrong shape or a missing tensor is an Error that
/// names file, tensor, found and wanted.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  virtual bool has(const std::string& name) const = 0;
  /// A matrix [out, in].
  virtual quant::Weight matrix(const std::string& name, int64_t out, int64_t in) = 0;
  /// The same from a tensor that is stored as its transpose [in, out].
  virtual quant::Weight transposed_matrix(const std::string& name, int64_t out, int64_t in);
  /// A vector [size] in the dtype of activations.
  virtual at::Tensor vector(const std::string& name, int64_t size) = 0;
  /// dtype of activations.
  virtual at::ScalarType dtype() const = 0;
  /// The values of this tensor are not needed any more: what memory holds of the file may go.
  virtual void release(const std::string& name) { (void)name; }
  /// Names in the source that nobody asked for.
  virtual std::vector<std::string> unused() const = 0;
};

}  // namespace budwood::models
