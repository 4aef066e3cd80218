#pragma once

#include <budwood/peft/io/hf_index.h>
#include <budwood/peft/models/weight_source.h>
#include <set>

namespace budwood::models {

/// Weights of a Hugging Face folder. Tensors whose dtype is unchanged are views of the mapped file.
class HfSource final : public WeightSource {
 public:
  /// dtype: undefined keeps what each tensor has.
  HfSource(const std::string& folder, std::optional<at::ScalarType> dtype);

  bool has(const std::string& name) const override;
  quant::Weight matrix(const std::string& name, int64_t out, int64_t in) override;
  at::Tensor vector(const std::string& name, int64_t size) override;
  at::ScalarType dtype() const override { return dtype_; }
  std::vector<std::string> unused() const override;

 private:
  at::Tensor read(const std::string& name, at::IntArrayRef shape);

  io::ModelFiles files_;
  at::ScalarType dtype_;
  std::set<std::string> used_;
};

}  // namespace budwood::models
