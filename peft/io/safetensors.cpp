#include <budwood/peft/io/safetensors.h>
#include <budwood/peft/io/text.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>

namespace budwood::io {
namespace {

constexpr std::string_view kWhere = "SafetensorsFile";
constexpr uint64_t kMaxHeader = 100'000'000;

// Reads the header event by event: a document tree would drop repeated keys and cost far more
// memory than the text.
class HeaderReader final : public nlohmann::json_sax<nlohmann::json> {
 public:
  HeaderReader(const std::string& path, std::vector<TensorInfo>& tensors, Metadata& metadata)
      : path_(path), tensors_(tensors), metadata_(metadata) {}

  bool null() override {
    if (place_ == Place::top && is_metadata()) return true;
    return other("null");
  }
  bool boolean(bool value) override { return other(value ? "true" : "false"); }
  bool number_integer(number_integer_t value) override { return other(std::to_string(value)); }
  bool number_float(number_float_t, const string_t& text) override { return other(text); }
  bool binary(binary_t&) override { return other("bytes"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (place_ == Place::shape) {
      if (value > INT64_MAX) refuse(fmt::format("a size of {} in its shape", value));
      tensors_.back().shape.push_back(static_cast<int64_t>(value));
    } else if (place_ == Place::offsets) {
      if (offsets_ == 2) refuse("data_offsets has more than 2 integers");
      (offsets_++ == 0 ? tensors_.back().begin : tensors_.back().end) = value;
    } else {
      other(std::to_string(value));
    }
    return true;
  }

  bool string(string_t& value) override {
    if (place_ == Place::metadata) {
      if (!metadata_.emplace(key_, std::move(value)).second)
        refuse(fmt::format("the key {} stands twice in __metadata__", in_quotes(key_)));
    } else if (place_ == Place::entry && key_ == "dtype") {
      const auto dtype = dtype_from_name(value);
      if (!dtype)
        refuse(fmt::format("unknown dtype {}, known are {}", in_quotes(value), dtype_names()));
      tensors_.back().dtype = *dtype;
    } else {
      other(in_quotes(value));
    }
    return true;
  }

  bool start_object(std::size_t) override {
    if (skipping()) return ++skip_depth_, true;
    if (place_ == Place::outside) {
      place_ = Place::top;
    } else if (place_ == Place::top && is_metadata()) {
      place_ = Place::metadata;
    } else if (place_ == Place::top) {
      place_ = Place::entry;
      has_dtype_ = has_shape_ = has_offsets_ = false;
    } else {
      other("an object");
    }
    return true;
  }

  bool end_object() override {
    if (skipping()) return --skip_depth_, true;
    if (place_ == Place::entry) {
      if (!has_dtype_ || !has_shape_ || !has_offsets_)
        refuse(fmt::format("{} is missing", !has_dtype_   ? "dtype"
                                            : !has_shape_ ? "shape"
                                                          : "data_offsets"));
      entry_name_.clear();
      in_entry_ = false;
    }
    place_ = place_ == Place::top ? Place::outside : Place::top;
    return true;
  }

  bool start_array(std::size_t) override {
    if (skipping()) return ++skip_depth_, true;
    if (place_ == Place::entry && key_ == "shape") {
      place_ = Place::shape;
    } else if (place_ == Place::entry && key_ == "data_offsets") {
      place_ = Place::offsets;
      offsets_ = 0;
    } else {
      other("a list");
    }
    return true;
  }

  bool end_array() override {
    if (skipping()) return --skip_depth_, true;
    if (place_ == Place::offsets && offsets_ != 2)
      refuse(fmt::format("data_offsets has {} integers, 2 are needed", offsets_));
    place_ = Place::entry;
    return true;
  }

  bool key(string_t& name) override {
    if (skipping()) return true;
    if (place_ == Place::top) {
      if (name == "__metadata__") {
        if (seen_metadata_) refuse("__metadata__ stands twice");
        seen_metadata_ = true;
      } else {
        start_tensor(name);
      }
    } else if (place_ == Place::entry) {
      bool* seen = name == "dtype"          ? &has_dtype_
                   : name == "shape"        ? &has_shape_
                   : name == "data_offsets" ? &has_offsets_
                                            : nullptr;
      if (seen && *seen) refuse(fmt::format("{} stands twice", name));
      if (seen) *seen = true;
    }
    key_ = std::move(name);
    return true;
  }

  bool parse_error(std::size_t at, const std::string&,
                   const nlohmann::detail::exception& e) override {
    throw Error(kWhere, fmt::format("{}: the header is not valid JSON at byte {}: {}", path_, at,
                                    e.what()));
  }

 private:
  enum class Place { outside, top, metadata, entry, shape, offsets };

  bool is_metadata() const { return key_ == "__metadata__"; }
  bool skipping() const { return skip_depth_ > 0; }

  void start_tensor(const std::string& name) {
    if (name.empty()) refuse("a tensor has an empty name");
    TensorInfo& tensor = tensors_.emplace_back();
    tensor.name = name;
    entry_name_ = name;
    in_entry_ = true;
  }

  [[noreturn]] void refuse(const std::string& fact) const {
    throw Error(kWhere,
                fmt::format("{}: {}{}", path_,
                            in_entry_ ? "tensor " + in_quotes(entry_name_) + ": " : "", fact));
  }

  // A value where none of the expected kinds stands: skipped in unknown fields, else refused.
  bool other(const std::string& found) {
    if (skipping()) return true;
    const bool known = key_ == "dtype" || key_ == "shape" || key_ == "data_offsets";
    switch (place_) {
      case Place::outside:
        refuse(fmt::format("the header is {}, an object is needed", found));
      case Place::top:
        refuse(fmt::format("{} is {}, an object is needed", is_metadata() ? key_ : "the entry",
                           found));
      case Place::metadata:
        refuse(fmt::format("the value of {} in __metadata__ is {}, a string is needed",
                           in_quotes(key_), found));
      case Place::shape:
      case Place::offsets:
        refuse(fmt::format("{} holds {}, integers of 0 or more are needed", key_, found));
      case Place::entry:
        if (known)
          refuse(fmt::format("{} is {}, {} is needed", key_, found,
                             key_ == "dtype" ? "a string" : "a list"));
        if (found == "an object" || found == "a list") ++skip_depth_;
    }
    return true;
  }

  const std::string& path_;
  std::vector<TensorInfo>& tensors_;
  Metadata& metadata_;
  Place place_ = Place::outside;
  std::string key_, entry_name_;
  bool in_entry_ = false, seen_metadata_ = false;
  bool has_dtype_ = false, has_shape_ = false, has_offsets_ = false;
  int offsets_ = 0;
  size_t skip_depth_ = 0;  // levels inside the value of an unknown field
};

void check_extent(const TensorInfo& t, uint64_t buffer, const std::string& path) {
  const auto refuse = [&](const std::string& fact) {
    throw Error(kWhere, fmt::format("{}: tensor {}: {}", path, in_quotes(t.name), fact));
  };
  if (t.begin > t.end) refuse(fmt::format("data_offsets [{}, {}] run backwards", t.begin, t.end));
  if (t.end > buffer)
    refuse(fmt::format("data_offsets [{}, {}] end beyond the {} bytes of data", t.begin, t.end,
                       buffer));
  const auto count = element_count(t.shape);
  if (!count)
    refuse(fmt::format("shape {} has more elements than 64 bits count", shape_text(t.shape)));
  const auto bytes = byte_count(t.dtype, *count);
  if (!bytes)
    refuse(fmt::format("{} elements of {} are not a whole number of bytes within 64 bits", *count,
                       dtype_name(t.dtype)));
  if (*bytes != t.bytes())
    refuse(fmt::format("data_offsets [{}, {}] hold {} bytes, {} {} needs {}", t.begin, t.end,
                       t.bytes(), dtype_name(t.dtype), shape_text(t.shape), *bytes));
}

// The tensors, sorted by their data, must follow one another without gap or overlap.
void check_tiling(const std::vector<TensorInfo>& tensors, uint64_t buffer,
                  const std::string& path) {
  uint64_t expected = 0;
  for (const auto& t : tensors) {
    if (t.begin != expected)
      throw Error(kWhere, fmt::format("{}: tensor {}: its data begins at {}, {} was expected: {}",
                                      path, in_quotes(t.name), t.begin, expected,
                                      t.begin < expected ? "it overlaps another tensor"
                                                         : "there is a gap before it"));
    expected = t.end;
  }
  if (expected != buffer)
    throw Error(kWhere, fmt::format("{}: the tensors end at byte {} of the data, the file holds {} "
                                    "bytes of data",
                                    path, expected, buffer));
}

// The length that the first 8 bytes of a file give its header.
uint64_t header_length(const std::byte* head, uint64_t file_size, const std::string& path) {
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | std::to_integer<uint64_t>(head[i]);
  if (length > kMaxHeader)
    throw Error(kWhere, fmt::format("{}: a header of {} bytes, at most {} are allowed; is this a "
                                    "safetensors file?",
                                    path, length, kMaxHeader));
  if (length > file_size - 8)
    throw Error(kWhere, fmt::format("{} is truncated: the header needs {} bytes, the file holds {}",
                                    path, length, file_size - 8));
  return length;
}

void check_room_for_length(uint64_t file_size, const std::string& path) {
  if (file_size < 8)
    throw Error(kWhere,
                fmt::format("{}: {} bytes are too short for a safetensors file", path, file_size));
}

// `head` holds the file from its start to the end of the header at least.
std::string_view header_text(const MappedFile& head, uint64_t file_size, const std::string& path) {
  check_room_for_length(file_size, path);
  const uint64_t length = header_length(head.data(), file_size, path);
  const std::string_view text(reinterpret_cast<const char*>(head.data()) + 8, length);
  // The JSON parser takes a NUL for the end of the text and skips a byte order mark.
  const auto first = text.find_first_not_of(" \t\r\n");
  if (first == std::string_view::npos || text[first] != '{')
    throw Error(kWhere,
                fmt::format("{}: the header of {} bytes is not a JSON object", path, length));
  if (const auto nul = text.find('\0'); nul != std::string_view::npos)
    throw Error(kWhere, fmt::format("{}: a NUL byte at {} of the header", path, nul));
  return text;
}

}  // namespace

SafetensorsFile SafetensorsFile::open(const std::filesystem::path& path) {
  return parse(MappedFile::open(path));
}

SafetensorsFile SafetensorsFile::open_header(const std::filesystem::path& path) {
  const RandomFile file(path);
  check_room_for_length(file.size(), path.string());
  std::string head(8, 0);
  file.read(0, head.data(), head.size());
  const auto* bytes = reinterpret_cast<const std::byte*>(head.data());
  head.resize(8 + header_length(bytes, file.size(), path.string()));
  file.read(0, head.data(), head.size());
  return parse(MappedFile::copy_of(head, path.string()), file.size(), /*mapped=*/false);
}

SafetensorsFile SafetensorsFile::parse(std::shared_ptr<MappedFile> mapped) {
  const uint64_t size = mapped->size();
  return parse(std::move(mapped), size, /*mapped=*/true);
}

SafetensorsFile SafetensorsFile::parse(std::shared_ptr<MappedFile> head, uint64_t file_size,
                                       bool mapped) {
  const std::string path = head->path().string();
  const std::string_view header = header_text(*head, file_size, path);
  SafetensorsFile file;
  HeaderReader reader(path, file.tensors_, file.metadata_);
  nlohmann::json::sax_parse(header.begin(), header.end(), &reader);

  file.data_begin_ = 8 + header.size();
  const uint64_t buffer = file_size - file.data_begin_;
  for (auto& t : file.tensors_) {
    check_extent(t, buffer, path);
    if (!mapped) continue;
    t.data = head->data() + file.data_begin_ + t.begin;
    t.file = head;
  }
  std::stable_sort(file.tensors_.begin(), file.tensors_.end(), [](const auto& a, const auto& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  check_tiling(file.tensors_, buffer, path);
  for (size_t i = 0; i < file.tensors_.size(); ++i)
    if (!file.index_.emplace(file.tensors_[i].name, i).second)
      throw Error(kWhere, fmt::format("{}: the tensor name {} stands twice", path,
                                      in_quotes(file.tensors_[i].name)));
  file.file_ = std::move(head);
  return file;
}

const TensorInfo* SafetensorsFile::find(std::string_view name) const {
  const auto it = index_.find(std::string(name));
  return it == index_.end() ? nullptr : &tensors_[it->second];
}

const TensorInfo& SafetensorsFile::at(std::string_view name) const {
  const TensorInfo* tensor = find(name);
  if (!tensor)
    throw Error(kWhere, fmt::format("{} has no tensor {}; it holds {} tensors", path().string(),
                                    in_quotes(name), tensors_.size()));
  return *tensor;
}

}  // namespace budwood::io
