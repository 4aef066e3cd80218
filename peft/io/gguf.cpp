#include <budwood/peft/io/dtype.h>
#include <budwood/peft/io/gguf.h>
#include <budwood/peft/io/text.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

namespace budwood::io {
namespace {

constexpr std::string_view kWhere = "GgufFile";
constexpr uint64_t kMaxLength = uint64_t{1} << 30;  // of strings and arrays
constexpr size_t kMaxNameBytes = 63;
constexpr uint32_t kMaxDims = 4;

static_assert(std::endian::native == std::endian::little, "GGUF is read without byte swaps");

}  // namespace

/// Reads fields one after another and never past the end.
class GgufCursor {
 public:
  explicit GgufCursor(const MappedFile& file)
      : path_(file.path()), data_(file.data()), size_(file.size()), held_(file.size()) {}
  explicit GgufCursor(const RandomFile& file)
      : path_(file.path()), size_(file.size()), pieces_(&file) {}

  [[noreturn]] void refuse(const std::string& fact) const {
    throw Error(kWhere, fmt::format("{}: {}", path_.string(), fact));
  }

  const std::filesystem::path& path() const { return path_; }
  uint64_t position() const { return at_; }
  uint64_t size() const { return size_; }
  uint64_t remaining() const { return size_ - at_; }

  /// The next bytes, until the next call.
  const std::byte* take(uint64_t bytes, std::string_view what) {
    if (bytes > remaining())
      refuse(
          fmt::format("{} needs {} bytes at offset {}, the file holds {} more; it is truncated "
                      "or damaged",
                      what, bytes, at_, remaining()));
    if (at_ + bytes > held_) fetch(bytes);
    const std::byte* from = data_ + (at_ - first_);
    at_ += bytes;
    return from;
  }

  template <typename T>
  T read(std::string_view what) {
    T value;
    std::memcpy(&value, take(sizeof(T), what), sizeof(T));
    return value;
  }

  std::string read_string(std::string_view what) {
    const auto length = read<uint64_t>(what);
    if (length > kMaxLength || length > remaining())
      refuse(fmt::format("{} is a text of {} bytes at offset {}, the file holds {} more", what,
                         length, at_, remaining()));
    return {reinterpret_cast<const char*>(take(length, what)), length};
  }

  bool read_bool(std::string_view what) {
    const auto byte = read<uint8_t>(what);
    if (byte > 1) refuse(fmt::format("{} is a bool of value {}, 0 or 1 is needed", what, byte));
    return byte == 1;
  }

 private:
  // The bytes from here on, at least so many.
  void fetch(uint64_t bytes) {
    constexpr uint64_t kAtOnce = uint64_t{1} << 20;
    buffer_.resize(std::min(std::max(bytes, kAtOnce), remaining()));
    pieces_->read(at_, buffer_.data(), buffer_.size());
    data_ = buffer_.data();
    first_ = at_;
    held_ = at_ + buffer_.size();
  }

  std::filesystem::path path_;
  const std::byte* data_ = nullptr;                // of the file from first_ on
  uint64_t size_, held_ = 0, first_ = 0, at_ = 0;  // held_: the end of what data_ points to
  const RandomFile* pieces_ = nullptr;
  std::vector<std::byte> buffer_;
};

namespace {

// Elements of alternative I of GgufArray.
template <typename T>
std::vector<T> read_elements(GgufCursor& in, uint64_t count, const std::string& what) {
  std::vector<T> values;
  if constexpr (std::is_same_v<T, std::string>) {
    if (count > in.remaining() / sizeof(uint64_t))
      in.refuse(fmt::format("{} counts {} texts, the file holds {} more bytes", what, count,
                            in.remaining()));
    values.reserve(count);
    for (uint64_t i = 0; i < count; ++i) values.push_back(in.read_string(what));
  } else if constexpr (std::is_same_v<T, bool>) {
    if (count > in.remaining())
      in.refuse(fmt::format("{} counts {} bools, the file holds {} more bytes", what, count,
                            in.remaining()));
    values.reserve(count);
    for (uint64_t i = 0; i < count; ++i) values.push_back(in.read_bool(what));
  } else {
    const auto* from = in.take(count * sizeof(T), what);  // count is capped: no overflow
    values.resize(count);
    if (count > 0) std::memcpy(values.data(), from, count * sizeof(T));
  }
  return values;
}

template <size_t I = 0>
GgufArray read_array_of(uint32_t type, GgufCursor& in, uint64_t count, const std::string& what) {
  if constexpr (I == std::variant_size_v<GgufArray>) {
    in.refuse(fmt::format("{} is an array of the unknown type {}", what, type));
  } else {
    if (type != I) return read_array_of<I + 1>(type, in, count, what);
    using Vector = std::variant_alternative_t<I, GgufArray>;
    if constexpr (std::is_same_v<Vector, std::monostate>)
      in.refuse(fmt::format("{} is an array of arrays", what));
    else
      return GgufArray(std::in_place_index<I>,
                       read_elements<typename Vector::value_type>(in, count, what));
  }
}

template <size_t I = 0>
GgufValue read_value(uint32_t type, GgufCursor& in, const std::string& what) {
  if constexpr (I == std::variant_size_v<GgufValue>) {
    in.refuse(fmt::format("{} is of the unknown type {}", what, type));
  } else {
    if (type != I) return read_value<I + 1>(type, in, what);
    using T = std::variant_alternative_t<I, GgufValue>;
    if constexpr (std::is_same_v<T, GgufArray>) {
      const auto element = in.read<uint32_t>(what);
      const auto count = in.read<uint64_t>(what);
      if (count > kMaxLength)
        in.refuse(fmt::format("{} is an array of {} elements, at most {} are allowed", what, count,
                              kMaxLength));
      return read_array_of(element, in, count, what);
    } else if constexpr (std::is_same_v<T, std::string>) {
      return in.read_string(what);
    } else if constexpr (std::is_same_v<T, bool>) {
      return in.read_bool(what);
    } else {
      return GgufValue(std::in_place_index<I>, in.read<T>(what));
    }
  }
}

uint32_t read_version(GgufCursor& in) {
  const auto* magic = in.take(4, "the magic");
  if (std::memcmp(magic, "GGUF", 4) != 0)
    in.refuse(fmt::format("it begins with {}, not with 'GGUF'; this is no GGUF file",
                          in_quotes({reinterpret_cast<const char*>(magic), 4})));
  const auto version = in.read<uint32_t>("the version");
  if (version != 0 && (version & 0xffff) == 0)
    in.refuse(
        fmt::format("version {:#x}: a big-endian file, only little-endian is supported", version));
  if (version != 2 && version != 3)
    in.refuse(fmt::format("version {}, supported are 2 and 3", version));
  return version;
}

uint32_t alignment_of(const GgufCursor& in, const GgufValue* value) {
  if (!value) return 32;
  const auto* alignment = std::get_if<uint32_t>(value);
  if (!alignment)
    in.refuse(
        fmt::format("general.alignment is of type {}, u32 is needed", gguf_type_name(*value)));
  if (!std::has_single_bit(*alignment))
    in.refuse(fmt::format("general.alignment is {}, a power of two is needed", *alignment));
  return *alignment;
}

GgufTensor read_tensor_info(GgufCursor& in, uint64_t number) {
  GgufTensor t;
  t.name = in.read_string(fmt::format("the name of tensor {}", number));
  const auto refuse = [&](const std::string& fact) {
    in.refuse(fmt::format("tensor {}: {}", in_quotes(t.name), fact));
  };
  if (t.name.empty()) in.refuse(fmt::format("tensor {} has an empty name", number));
  if (t.name.size() > kMaxNameBytes)
    refuse(fmt::format("a name of {} bytes, at most {} are allowed", t.name.size(), kMaxNameBytes));
  const auto dims = in.read<uint32_t>("a tensor's number of dimensions");
  if (dims > kMaxDims) refuse(fmt::format("{} dimensions, at most {} are allowed", dims, kMaxDims));
  for (uint32_t i = 0; i < dims; ++i) {
    const auto size = in.read<uint64_t>("a tensor's shape");
    if (size > INT64_MAX) refuse(fmt::format("a size of {} in its shape", size));
    t.shape.insert(t.shape.begin(), static_cast<int64_t>(size));
  }
  const auto id = in.read<uint32_t>("a tensor's type");
  t.offset = in.read<uint64_t>("a tensor's offset");
  const auto* traits = ggml_type_traits(id);
  if (!traits) refuse(fmt::format("unknown ggml type {}", id));
  t.type = traits->type;
  const int64_t row = t.shape.empty() ? 1 : t.shape.back();
  if (row % traits->block != 0)
    refuse(fmt::format("rows of {} elements, {} needs a multiple of {}", row, traits->name,
                       traits->block));
  const auto count = element_count(t.shape);
  if (!count || *count > INT64_MAX)
    refuse(fmt::format("shape {} has more elements than 63 bits count", shape_text(t.shape)));
  const auto bytes = checked_multiply(*count / traits->block, traits->block_bytes);
  if (!bytes)
    refuse(fmt::format("shape {} has more bytes than 64 bits count", shape_text(t.shape)));
  t.bytes = *bytes;
  return t;
}

}  // namespace

void require_decodable(GgmlType type, std::string_view tensor, std::string_view path) {
  const auto& traits = ggml_type_traits(type);
  if (!traits.decodable)
    throw Error("gguf", fmt::format("{}: tensor {} is of type {}; supported are {}", path,
                                    in_quotes(tensor), traits.name,
                                    quant::kernels::decodable_ggml_types()));
}

void GgufTensor::read(uint64_t begin, void* to, size_t count) const {
  if (begin > bytes || count > bytes - begin)
    throw Error(kWhere, fmt::format("{} has {} bytes, {} at {} were asked for", in_quotes(name),
                                    bytes, count, begin));
  if (data != nullptr)
    std::memcpy(to, data + begin, count);
  else
    pieces->read(place + begin, to, count);
}

GgufFile GgufFile::open(const std::filesystem::path& path, Access access) {
  if (access == Access::mapped) return parse(MappedFile::open(path));
  const auto pieces = std::make_shared<const RandomFile>(path);
  GgufCursor in(*pieces);
  auto file = parse(in);
  for (auto& tensor : file.tensors_) tensor.pieces = pieces;
  return file;
}

GgufFile GgufFile::parse(std::shared_ptr<MappedFile> mapped) {
  GgufCursor in(*mapped);
  auto file = parse(in);
  for (auto& tensor : file.tensors_) {
    tensor.data = mapped->data() + tensor.place;
    tensor.file = mapped;
  }
  return file;
}

GgufFile GgufFile::parse(GgufCursor& in) {
  GgufFile file;
  file.path_ = in.path();
  file.version_ = read_version(in);
  const auto n_tensors = in.read<uint64_t>("the number of tensors");
  const auto n_kv = in.read<uint64_t>("the number of keys");
  // The shortest key takes 14 bytes, the shortest tensor info 25.
  if (n_kv > in.remaining() / 14)
    in.refuse(fmt::format("it counts {} keys in {} bytes", n_kv, in.remaining()));
  if (n_tensors > in.remaining() / 25)
    in.refuse(fmt::format("it counts {} tensors in {} bytes", n_tensors, in.remaining()));
  for (uint64_t i = 0; i < n_kv; ++i) {
    auto key = in.read_string(fmt::format("key {}", i));
    if (key.empty()) in.refuse(fmt::format("key {} is empty", i));
    if (!is_utf8(key)) in.refuse(fmt::format("key {} is not valid UTF-8", in_quotes(key)));
    if (!file.keys_.emplace(key, i).second)
      in.refuse(fmt::format("the key {} stands twice", in_quotes(key)));
    const auto type = in.read<uint32_t>("a value's type");
    auto value = read_value(type, in, "the value of " + in_quotes(key));
    file.metadata_.emplace_back(std::move(key), std::move(value));
  }
  file.alignment_ = alignment_of(in, file.find_value("general.alignment"));
  for (uint64_t i = 0; i < n_tensors; ++i) {
    file.tensors_.push_back(read_tensor_info(in, i));
    if (!file.index_.emplace(file.tensors_.back().name, i).second)
      in.refuse(
          fmt::format("the tensor name {} stands twice", in_quotes(file.tensors_.back().name)));
  }

  const uint64_t mask = uint64_t{file.alignment_} - 1;
  const uint64_t begin = (in.position() + mask) & ~mask;
  const uint64_t space = begin <= in.size() ? in.size() - begin : 0;
  uint64_t expected = 0;
  for (auto& t : file.tensors_) {
    if (t.offset != expected)
      in.refuse(fmt::format("tensor {}: its data is at offset {}, {} was expected",
                            in_quotes(t.name), t.offset, expected));
    if (begin > in.size() || t.offset > space || t.bytes > space - t.offset)
      in.refuse(
          fmt::format("tensor {}: its {} bytes at offset {} end beyond the {} bytes of data; "
                      "the file is truncated",
                      in_quotes(t.name), t.bytes, t.offset, space));
    expected = (t.offset + t.bytes + mask) & ~mask;  // both are within the file: no overflow
    t.place = begin + t.offset;
  }
  if (file.has("split.count") && file.get_u32("split.count") > 1)
    in.refuse(
        fmt::format("it is one of {} parts of a split file, which is not supported; join "
                    "them with llama-gguf-split --merge",
                    file.get_u32("split.count")));
  return file;
}

const GgufTensor* GgufFile::find(std::string_view name) const {
  const auto it = index_.find(std::string(name));
  return it == index_.end() ? nullptr : &tensors_[it->second];
}

const GgufTensor& GgufFile::at(std::string_view name) const {
  const GgufTensor* tensor = find(name);
  if (!tensor)
    throw Error(kWhere, fmt::format("{} has no tensor {}; it holds {} tensors", path().string(),
                                    in_quotes(name), tensors_.size()));
  return *tensor;
}

}  // namespace budwood::io
