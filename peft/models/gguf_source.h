#pragma once

#include <budwood/peft/io/gguf.h>
#include <budwood/peft/models/config.h>
#include <budwood/peft/models/weight_source.h>
#include <set>

namespace budwood::models {

/// Weights of a GGUF file under transformers' names. Blocks are decoded to `dtype`, or with
/// `packed` matrices are views of the mapped file; the rows of q and k of architecture "llama" are
/// put back into transformers' rotary order (a copy of those rows, packed or not).
class GgufSource final : public WeightSource {
 public:
  GgufSource(const std::string& path, at::ScalarType dtype, bool packed = false);

  /// The configuration that the file's metadata describe.
  const ModelConfig& config() const { return config_; }

  bool has(const std::string& name) const override;
  quant::Weight matrix(const std::string& name, int64_t out, int64_t in) override;
  at::Tensor vector(const std::string& name, int64_t size) override;
  at::ScalarType dtype() const override { return dtype_; }
  std::vector<std::string> unused() const override;

 private:
  const io::GgufTensor& find(const std::string& name, at::IntArrayRef shape);
  at::Tensor read(const std::string& name, at::IntArrayRef shape);
  at::Tensor in_rotary_order(const std::string& name, const at::Tensor& rows) const;

  io::GgufFile file_;
  ModelConfig config_;
  at::ScalarType dtype_;
  bool packed_, permuted_;
  std::set<std::string> used_;
};

}  // namespace budwood::models
