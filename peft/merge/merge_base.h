#pragma once

#include <budwood/peft/io/hf_index.h>
#include <budwood/peft/merge/fold_term.h>
#include <budwood/peft/merge/packed_rows.h>

#include <cstddef>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace budwood {

/// A model that adapters are folded into: its tensors under the names and shapes that a Hugging
/// Face class gives them, however its files hold them. From several threads.
class MergeBase {
 public:
  virtual ~MergeBase() = default;

  const std::filesystem::path& path() const { return path_; }
  /// What config.json says or would say; empty when nothing is known.
  const std::string& config() const { return config_; }

  virtual const std::vector<const io::TensorInfo*>& tensors() const = 0;
  /// Null when there is no such tensor.
  virtual const io::TensorInfo* find(std::string_view name) const = 0;
  /// Bytes of a plain tensor.
  virtual void read(const io::TensorInfo& tensor, uint64_t begin, void* to, size_t bytes) const = 0;

  /// Whether a tensor is stored as something else than numbers of its dtype, which is then the one
  /// that it is decoded to unless another is asked for.
  virtual bool packed(const io::TensorInfo& tensor) const { return (void)tensor, false; }
  /// Opens a packed tensor.
  virtual std::unique_ptr<PackedRows> open(const io::TensorInfo& tensor) const;
  /// The same matrix as if it had the scales (and zero points) of a term, or, with another weight
  /// w, σ₀ + w (σ - σ₀). Throws for what has no scales in groups.
  virtual std::unique_ptr<PackedRows> open_rescaled(const io::TensorInfo& tensor,
                                                    const FoldTerm& term, double weight) const;

  /// Puts everything that is no weight and no config.json into the merged model's folder.
  virtual void carry_over(const std::filesystem::path& folder) const = 0;
  /// What does not survive in a Hugging Face folder.
  virtual std::vector<std::string> warnings() const { return {}; }

 protected:
  MergeBase(std::filesystem::path path, std::string config)
      : path_(std::move(path)), config_(std::move(config)) {}

 private:
  std::filesystem::path path_;
  std::string config_;
};

/// A folder of plain weights, or a single file of them, read piece by piece.
class PlainBase final : public MergeBase {
 public:
  explicit PlainBase(const std::filesystem::path& path);
  const std::vector<const io::TensorInfo*>& tensors() const override { return files_.tensors(); }
  const io::TensorInfo* find(std::string_view name) const override { return files_.find(name); }
  void read(const io::TensorInfo& tensor, uint64_t begin, void* to, size_t bytes) const override {
    files_.read(tensor, begin, to, bytes);
  }
  void carry_over(const std::filesystem::path& folder) const override;
  const io::ModelFiles& files() const { return files_; }

 private:
  io::ModelFiles files_;
};

/// The text of a folder's config.json, checked to be a JSON object; empty when there is none.
std::string read_config_text(const std::filesystem::path& folder);
/// `quantization_config` of such a text as JSON, or empty.
std::string quantization_of(const std::string& config);
/// Copies tokeniser, templates, code and licences of a model's folder into another.
void carry_other_files(const std::filesystem::path& from, const std::filesystem::path& to);

/// Opens what is no folder of plain weights; null when the path is not of its kind.
using MergeBaseOpener = std::function<std::unique_ptr<MergeBase>(const std::filesystem::path&)>;
/// Adds a kind of model files; called from a static object in its own source file.
bool register_merge_base(MergeBaseOpener opener);
/// A model's files, of whatever kind.
std::unique_ptr<MergeBase> open_merge_base(const std::filesystem::path& path);

}  // namespace budwood
