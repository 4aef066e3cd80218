#pragma once

#include <budwood/peft/io/dtype.h>
#include <budwood/peft/io/file.h>

#include <cstddef>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

/// The safetensors format: u64 header length, JSON header, tensors back to back (little-endian,
/// row-major). https://github.com/huggingface/safetensors
namespace budwood::io {

using Metadata = std::map<std::string, std::string>;

/// One tensor of an open file. `data` lives as long as `file` does; its alignment is whatever the
/// file gives, so elements are to be copied or read by memcpy.
struct TensorInfo {
  std::string name;
  Dtype dtype = Dtype::f32;
  std::vector<int64_t> shape;  ///< empty for a scalar
  uint64_t begin = 0;          ///< bytes from the start of the data section
  uint64_t end = 0;
  const std::byte* data = nullptr;
  std::shared_ptr<MappedFile> file;

  uint64_t bytes() const { return end - begin; }
};

/// An open file whose header has been checked in full: every tensor lies inside the file, has the
/// size of its shape, overlaps no other and leaves no gap. Throws Error for all else, also where
/// the reference reader is lenient: a tensor name given twice.
class SafetensorsFile {
 public:
  static SafetensorsFile open(const std::filesystem::path& path);
  /// The header alone: TensorInfo::data and ::file are null, and the data is read by RandomFile at
  /// data_begin() + TensorInfo::begin. Takes no address space for the data.
  static SafetensorsFile open_header(const std::filesystem::path& path);
  static SafetensorsFile parse(std::shared_ptr<MappedFile> file);

  /// All tensors, in the order of their data.
  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  /// Null when there is no such tensor.
  const TensorInfo* find(std::string_view name) const;
  /// Throws when there is no such tensor.
  const TensorInfo& at(std::string_view name) const;
  /// "__metadata__"; empty when absent or null.
  const Metadata& metadata() const { return metadata_; }
  const std::filesystem::path& path() const { return file_->path(); }
  /// Where the data section begins in the file.
  uint64_t data_begin() const { return data_begin_; }

 private:
  static SafetensorsFile parse(std::shared_ptr<MappedFile> head, uint64_t file_size, bool mapped);
  std::shared_ptr<MappedFile> file_;
  std::vector<TensorInfo> tensors_;
  std::unordered_map<std::string, size_t> index_;
  Metadata metadata_;
  uint64_t data_begin_ = 0;
};

/// A tensor that is to be written.
struct TensorSpec {
  std::string name;
  Dtype dtype = Dtype::f32;
  std::vector<int64_t> shape;

  /// Throws when the shape has no size in bytes.
  uint64_t bytes() const;
};

/// Tensors in the order in which the reference writer lays them out: by dtype, then by name. Throws
/// for empty and repeated names.
std::vector<TensorSpec> in_reference_order(std::vector<TensorSpec> tensors);

/// Writes a file with the header known from the start, so that data need not be held. The bytes
/// are those of the reference writer, metadata sorted by key.
class SafetensorsWriter {
 public:
  SafetensorsWriter(const std::filesystem::path& path, std::vector<TensorSpec> tensors,
                    const Metadata& metadata = {});

  /// The order in which the data is to be written.
  const std::vector<TensorSpec>& order() const { return order_; }
  /// The next bytes of the tensor whose turn it is: all of them, or piece by piece.
  void write(std::string_view name, const void* data, size_t bytes);
  /// Whether every tensor has all its bytes.
  bool complete() const { return next_ == order_.size(); }
  /// Throws when data is missing; else the file appears at its path.
  void commit();

 private:
  void skip_complete();
  std::vector<TensorSpec> order_;
  AtomicFile file_;
  size_t next_ = 0;    // the tensor whose turn it is
  uint64_t left_ = 0;  // its bytes still to come
};

/// A tensor with its data, for write_safetensors.
struct TensorData {
  TensorSpec spec;
  std::span<const std::byte> data;
};

/// Writes tensors that are all in memory, in any order.
void write_safetensors(const std::filesystem::path& path, const std::vector<TensorData>& tensors,
                       const Metadata& metadata = {});

}  // namespace budwood::io
