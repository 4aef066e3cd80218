#pragma once

#include <budwood/peft/io/file.h>
#include <budwood/quant/kernels/ggml_type.h>

#include <cstddef>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

/// GGUF, versions 2 and 3 (little-endian): metadata, tensor infos, tensor data.
/// https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
namespace budwood::io {

using quant::kernels::ggml_type_traits;
using quant::kernels::GgmlType;

/// The place of an alternative is the type's number in the file; arrays hold no arrays.
using GgufArray =
    std::variant<std::vector<uint8_t>, std::vector<int8_t>, std::vector<uint16_t>,
                 std::vector<int16_t>, std::vector<uint32_t>, std::vector<int32_t>,
                 std::vector<float>, std::vector<bool>, std::vector<std::string>, std::monostate,
                 std::vector<uint64_t>, std::vector<int64_t>, std::vector<double>>;
using GgufValue = std::variant<uint8_t, int8_t, uint16_t, int16_t, uint32_t, int32_t, float, bool,
                               std::string, GgufArray, uint64_t, int64_t, double>;
using GgufMetadata = std::vector<std::pair<std::string, GgufValue>>;

/// "u32", "string", "array of f32": for listings and errors.
std::string gguf_type_name(const GgufValue& value);

/// One tensor of an open file. `data` lives as long as `file` does; both are null in a file that is
/// read piece by piece.
struct GgufTensor {
  std::string name;
  GgmlType type = GgmlType::f32;
  std::vector<int64_t> shape;  ///< torch's order, [rows, cols]: blocks run along the last axis
  uint64_t offset = 0;         ///< bytes from the start of the data section
  uint64_t bytes = 0;
  const std::byte* data = nullptr;
  std::shared_ptr<MappedFile> file;
  std::shared_ptr<const RandomFile> pieces;
  uint64_t place = 0;  ///< bytes from the start of the file

  /// Bytes [begin, begin + count) of the data, however the file was opened. From several threads.
  void read(uint64_t begin, void* to, size_t count) const;
};

/// Throws when Budwood cannot decode the type; `tensor` and `path` are named in the error.
void require_decodable(GgmlType type, std::string_view tensor, std::string_view path);

/// An open file whose structure has been checked in full; throws Error for everything llama.cpp
/// refuses, and for split files. Tensors of types that Budwood cannot decode are listed too: see
/// require_decodable.
class GgufFile {
 public:
  static GgufFile open(const std::filesystem::path& path, Access access = Access::mapped);
  static GgufFile parse(std::shared_ptr<MappedFile> file);

  /// All keys, in the order of the file.
  const GgufMetadata& metadata() const { return metadata_; }
  /// Null when there is no such key.
  const GgufValue* find_value(std::string_view key) const;
  bool has(std::string_view key) const { return find_value(key) != nullptr; }

  /// The value of a key; throws, naming the key, when it is absent or of another kind. Integers of
  /// any width are taken when the value fits.
  uint32_t get_u32(std::string_view key) const;
  uint64_t get_u64(std::string_view key) const;
  float get_f32(std::string_view key) const;
  bool get_bool(std::string_view key) const;
  const std::string& get_string(std::string_view key) const;
  const std::vector<std::string>& get_strings(std::string_view key) const;
  std::vector<int64_t> get_integers(std::string_view key) const;
  const std::vector<float>& get_floats(std::string_view key) const;
  /// The same, with a value for when the key is absent.
  uint32_t get_u32(std::string_view key, uint32_t absent) const;
  float get_f32(std::string_view key, float absent) const;
  bool get_bool(std::string_view key, bool absent) const;
  std::string get_string(std::string_view key, const std::string& absent) const;

  /// All tensors, in the order of the file, which is that of their data.
  const std::vector<GgufTensor>& tensors() const { return tensors_; }
  const GgufTensor* find(std::string_view name) const;
  const GgufTensor& at(std::string_view name) const;

  uint32_t version() const { return version_; }
  uint32_t alignment() const { return alignment_; }
  const std::filesystem::path& path() const { return path_; }

 private:
  const GgufValue& value(std::string_view key) const;
  static GgufFile parse(class GgufCursor& in);
  std::filesystem::path path_;
  GgufMetadata metadata_;
  std::vector<GgufTensor> tensors_;
  std::unordered_map<std::string, size_t> keys_, index_;
  uint32_t version_ = 0, alignment_ = 32;
};

/// A tensor that is to be written; shape in torch's order.
struct GgufTensorSpec {
  std::string name;
  GgmlType type = GgmlType::f32;
  std::vector<int64_t> shape;

  /// Throws when the last axis is not whole blocks or the size overflows.
  uint64_t bytes() const;
};

/// Writes a version 3 file. Alignment is the key general.alignment, or 32.
class GgufWriter {
 public:
  GgufWriter(const std::filesystem::path& path, const GgufMetadata& metadata,
             std::vector<GgufTensorSpec> tensors);
  /// The next bytes of the tensor whose turn it is, in the order given: all or piece by piece.
  void write(std::string_view name, const void* data, size_t bytes);
  /// Throws when data is missing; else the file appears at its path.
  void commit();

 private:
  void finish_tensors();
  std::vector<GgufTensorSpec> tensors_;
  AtomicFile file_;
  uint32_t alignment_ = 32;
  size_t next_ = 0;
  uint64_t left_ = 0;
};

}  // namespace budwood::io
