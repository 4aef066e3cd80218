#pragma once

#include <budwood/peft/io/safetensors.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

/// The weights of a Hugging Face model folder: one model.safetensors, or several shards and
/// model.safetensors.index.json, {"metadata": {...}, "weight_map": {tensor: file}}.
namespace budwood::io {

/// The path of a file in a folder. `name` must be a plain name, the file must exist, and a symbolic
/// link must stay in the folder or be one of the Hugging Face hub's cache, where
/// snapshots/<revision>/<name> points to blobs/<hash>. Throws otherwise.
std::filesystem::path file_in_folder(const std::filesystem::path& folder, const std::string& name);

/// The open weight files of one model. Index and files must agree entirely: a missing shard, a
/// tensor that is not where the index says and one that the index does not know are errors.
class ModelFiles {
 public:
  /// A model folder, or a single .safetensors file.
  static ModelFiles open(const std::filesystem::path& path, Access access = Access::mapped);
  ModelFiles(ModelFiles&&) = default;
  ModelFiles& operator=(ModelFiles&&) = default;

  /// All tensors: files in the order of their names, in each the order of the data.
  const std::vector<const TensorInfo*>& tensors() const { return tensors_; }
  /// Null when there is no such tensor.
  const TensorInfo* find(std::string_view name) const;
  /// Throws when there is no such tensor.
  const TensorInfo& at(std::string_view name) const;
  const std::vector<SafetensorsFile>& files() const { return files_; }
  /// Bytes [begin, begin + bytes) of a tensor of this model; files opened with Access::headers.
  void read(const TensorInfo& tensor, uint64_t begin, void* to, size_t bytes) const;
  /// What was opened.
  const std::filesystem::path& path() const { return path_; }

 private:
  ModelFiles(std::filesystem::path path, Access access) : path_(std::move(path)), access_(access) {}
  SafetensorsFile open_file(const std::filesystem::path& file) const;
  void open_single(const std::filesystem::path& file);
  void open_shards(const std::filesystem::path& folder);
  std::filesystem::path path_;
  Access access_;
  std::vector<SafetensorsFile> files_;
  std::vector<RandomFile> readers_;                        // of files_, with Access::headers
  std::unordered_map<const TensorInfo*, size_t> file_of_;  // index into files_
  std::vector<const TensorInfo*> tensors_;                 // into files_
  std::unordered_map<std::string_view, const TensorInfo*> index_;
};

/// Which tensors go into which shard: in the given order, a new shard when the next tensor would
/// take the current one past max_bytes; a tensor larger than that gets a shard of its own. The
/// grouping is that of transformers' save_pretrained.
std::vector<std::vector<TensorSpec>> plan_shards(const std::vector<TensorSpec>& tensors,
                                                 uint64_t max_bytes);

/// Writes a model's weights as model.safetensors, or, when there is more than max_shard_bytes, as
/// model-00001-of-0000N.safetensors and the index. Shards appear one by one, so write into the
/// path of an AtomicFolder.
class ShardedWriter {
 public:
  /// `present`: shards that are in the folder already, by their names; throws when one of them
  /// does not hold what would be written into it.
  ShardedWriter(std::filesystem::path folder, const std::vector<TensorSpec>& tensors,
                uint64_t max_shard_bytes = 5'000'000'000, Metadata metadata = {{"format", "pt"}},
                const std::vector<std::string>& present = {});

  /// The order in which the data is to be written, shard after shard, without present ones.
  const std::vector<TensorSpec>& order() const { return order_; }
  /// The next bytes of the tensor whose turn it is: all of them, or piece by piece.
  void write(std::string_view name, const void* data, size_t bytes);
  /// Throws when data is missing; else finishes the last shard and writes the index.
  void commit();
  /// File names of the shards.
  const std::vector<std::string>& names() const { return names_; }
  /// Those of them that are whole.
  std::vector<std::string> finished() const;

 private:
  void check_present(size_t shard) const;
  void open_next();
  std::filesystem::path folder_;
  Metadata metadata_;
  std::vector<std::vector<TensorSpec>> shards_;
  std::vector<std::string> names_;
  std::vector<TensorSpec> order_;
  std::vector<bool> finished_;
  std::unique_ptr<SafetensorsWriter> writer_;  // null when no shard is left
  size_t shard_ = 0;
};

}  // namespace budwood::io
