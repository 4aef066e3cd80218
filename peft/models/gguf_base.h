#pragma once

#include <budwood/peft/io/gguf.h>
#include <budwood/peft/merge/merge_base.h>
#include <budwood/peft/models/config.h>
#include <deque>
#include <map>

namespace budwood::models {

/// One row in a type of ggml, each value rounded once, and what is read of it again (may be the row
/// itself). False when the type is not written or a value is not finite in it.
bool encode_row(io::GgmlType type, const double* values, int64_t cols, std::byte* bytes,
                double* written);

/// A GGUF file that adapters are folded into.
class GgufBase final : public MergeBase {
 public:
  explicit GgufBase(const std::filesystem::path& path);

  const std::vector<const io::TensorInfo*>& tensors() const override { return tensors_; }
  const io::TensorInfo* find(std::string_view name) const override;
  void read(const io::TensorInfo& tensor, uint64_t begin, void* to, size_t bytes) const override;
  bool packed(const io::TensorInfo&) const override { return true; }
  std::unique_ptr<PackedRows> open(const io::TensorInfo& tensor) const override;
  void carry_over(const std::filesystem::path& folder) const override;
  std::vector<std::string> warnings() const override;

  const io::GgufFile& file() const { return file_; }
  const ModelConfig& model_config() const { return model_config_; }
  /// The file's tensor of a tensor of this base.
  const io::GgufTensor& stored(const io::TensorInfo& tensor) const { return *stored_.at(&tensor); }

 private:
  explicit GgufBase(io::GgufFile file);
  io::GgufFile file_;
  ModelConfig model_config_;
  bool permuted_;
  std::deque<io::TensorInfo> infos_;
  std::vector<const io::TensorInfo*> tensors_;
  std::map<const io::TensorInfo*, const io::GgufTensor*> stored_;
};

}  // namespace budwood::models
