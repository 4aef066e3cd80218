#pragma once

#include <budwood/peft/merge/merge_base.h>
#include <budwood/quant/checkpoints/checkpoint.h>
#include <deque>
#include <map>

namespace budwood::models {

/// A quantised folder (quant/checkpoints) that adapters are folded into.
class PackedBase final : public MergeBase {
 public:
  /// What is stored for one packed matrix.
  struct Layer {
    std::string path;  ///< with a dot at its end
    std::vector<const io::TensorInfo*> parts;
  };

  explicit PackedBase(const std::filesystem::path& folder);

  const std::vector<const io::TensorInfo*>& tensors() const override { return tensors_; }
  const io::TensorInfo* find(std::string_view name) const override;
  void read(const io::TensorInfo& tensor, uint64_t begin, void* to, size_t bytes) const override {
    files_.read(tensor, begin, to, bytes);
  }
  bool packed(const io::TensorInfo& tensor) const override { return layers_.contains(&tensor); }
  std::unique_ptr<PackedRows> open(const io::TensorInfo& tensor) const override;
  std::unique_ptr<PackedRows> open_rescaled(const io::TensorInfo& tensor, const FoldTerm& term,
                                            double weight) const override;
  /// A packed matrix with the scales of a term.
  quant::Weight rescaled(const io::TensorInfo& tensor, const FoldTerm& term, double weight) const;
  void carry_over(const std::filesystem::path& folder) const override;

  /// The stored parts of a packed matrix, and the matrix they make.
  const Layer& layer(const io::TensorInfo& tensor) const { return layers_.at(&tensor); }
  quant::StoredParts parts(const Layer& layer) const;
  quant::Weight weight(const io::TensorInfo& tensor) const;
  /// "bitsandbytes", "gptq", ...
  const std::string& method() const { return method_; }

 private:
  quant::StoredParts described_parts(const Layer& layer) const;
  io::ModelFiles files_;
  std::unique_ptr<quant::Checkpoint> checkpoint_;
  std::string method_;
  std::deque<io::TensorInfo> infos_;
  std::vector<const io::TensorInfo*> tensors_;
  std::map<const io::TensorInfo*, Layer> layers_;
  std::map<std::string, const io::TensorInfo*, std::less<>> index_;
};

}  // namespace budwood::models
