#pragma once

#include <budwood/peft/io/hf_index.h>
#include <budwood/peft/models/weight_source.h>
#include <budwood/quant/checkpoints/checkpoint.h>
#include <map>
#include <set>

namespace budwood::models {

/// The dtype of activations: that of most weights, so one table of a model decides nothing. Scales
/// of packed weights have names of their own and do not count.
at::ScalarType most_common_float(const io::ModelFiles& files);
/// "model.layers.0.mlp.up_proj." of a tensor of that layer: its name ends in one more name, or in
/// "weight" and one more ("up_proj.weight.absmax").
std::string layer_of_part(const std::string& name);

/// Weights of a Hugging Face folder. Tensors whose dtype is unchanged are views of the mapped file,
/// and so are the codes of a quantised folder where their layout is the one that is multiplied.
class HfSource final : public WeightSource {
 public:
  /// dtype: of activations and plain weights; undefined keeps what each tensor has.
  /// quantization_config: that of config.json as text, or empty.
  /// as_stored: 16-bit matrices of a float32 model stay views of the file.
  HfSource(const std::string& folder, std::optional<at::ScalarType> dtype,
           const std::string& quantization_config = "", bool as_stored = false);

  bool has(const std::string& name) const override;
  quant::Weight matrix(const std::string& name, int64_t out, int64_t in) override;
  quant::Weight transposed_matrix(const std::string& name, int64_t out, int64_t in) override;
  at::Tensor vector(const std::string& name, int64_t size) override;
  at::ScalarType dtype() const override { return dtype_; }
  void release(const std::string& name) override;
  std::vector<std::string> unused() const override;

 private:
  at::Tensor converted(const std::string& name, at::IntArrayRef shape);
  at::Tensor for_products(const std::string& name, at::IntArrayRef shape);
  at::Tensor read(const std::string& name, at::IntArrayRef shape);
  // The packed tensors of the layer whose weight is `name`; empty when it is plain.
  quant::StoredParts packed_parts(const std::string& name) const;

  io::ModelFiles files_;
  at::ScalarType dtype_;
  bool as_stored_;
  std::unique_ptr<quant::Checkpoint> checkpoint_;
  std::map<std::string, std::vector<const io::TensorInfo*>> layers_;  // by path
  std::set<std::string> used_;
};

}  // namespace budwood::models
