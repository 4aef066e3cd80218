#include <budwood/peft/io/dtype.h>
#include <budwood/peft/io/gguf.h>
#include <budwood/peft/io/text.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <bit>
#include <type_traits>
#include <unordered_set>

namespace budwood::io {
namespace {

constexpr std::string_view kWhere = "GgufWriter";
constexpr size_t kMaxNameBytes = 63;
constexpr size_t kMaxDims = 4;

[[noreturn]] void refuse(const std::string& fact) {
  throw Error(kWhere, fact);
}

template <typename T>
void append(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof(T));
}

void append_string(std::string& out, const std::string& text) {
  append<uint64_t>(out, text.size());
  out += text;
}

template <typename T>
void append_scalar(std::string& out, const T& value) {
  if constexpr (std::is_same_v<T, std::string>)
    append_string(out, value);
  else if constexpr (std::is_same_v<T, bool>)
    append<uint8_t>(out, value ? 1 : 0);
  else
    append(out, value);
}

void append_array(std::string& out, const GgufArray& array, const std::string& key) {
  append<uint32_t>(out, static_cast<uint32_t>(array.index()));
  std::visit(
      [&](const auto& values) {
        using Vector = std::decay_t<decltype(values)>;
        if constexpr (std::is_same_v<Vector, std::monostate>) {
          refuse(fmt::format("the key {} is an array without elements' type", in_quotes(key)));
        } else {
          append<uint64_t>(out, values.size());
          for (const typename Vector::value_type& v : values) append_scalar(out, v);
        }
      },
      array);
}

uint32_t alignment_of(const GgufMetadata& metadata) {
  for (const auto& [key, value] : metadata) {
    if (key != "general.alignment") continue;
    const auto* alignment = std::get_if<uint32_t>(&value);
    if (!alignment || !std::has_single_bit(*alignment))
      refuse("general.alignment must be a u32 and a power of two");
    return *alignment;
  }
  return 32;
}

std::string metadata_bytes(const GgufMetadata& metadata) {
  std::string out;
  std::unordered_set<std::string_view> keys;
  for (const auto& entry : metadata) {
    const auto& key = entry.first;
    if (key.empty() || !is_utf8(key))
      refuse(fmt::format("the key {} is empty or not valid UTF-8", in_quotes(key)));
    if (!keys.insert(key).second) refuse(fmt::format("the key {} stands twice", in_quotes(key)));
    append_string(out, key);
    append<uint32_t>(out, static_cast<uint32_t>(entry.second.index()));
    std::visit(
        [&](const auto& v) {
          if constexpr (std::is_same_v<std::decay_t<decltype(v)>, GgufArray>)
            append_array(out, v, key);
          else
            append_scalar(out, v);
        },
        entry.second);
  }
  return out;
}

std::string info_bytes(const std::vector<GgufTensorSpec>& tensors, uint64_t alignment) {
  std::string out;
  std::unordered_set<std::string_view> names;
  uint64_t offset = 0;
  for (const auto& t : tensors) {
    if (t.name.empty() || t.name.size() > kMaxNameBytes)
      refuse(fmt::format("the tensor name {} has {} bytes, 1 to {} are allowed", in_quotes(t.name),
                         t.name.size(), kMaxNameBytes));
    if (!names.insert(t.name).second)
      refuse(fmt::format("two tensors are called {}", in_quotes(t.name)));
    if (t.shape.size() > kMaxDims)
      refuse(fmt::format("tensor {}: shape {} has more than {} dimensions", in_quotes(t.name),
                         shape_text(t.shape), kMaxDims));
    const uint64_t bytes = t.bytes();
    append_string(out, t.name);
    append<uint32_t>(out, static_cast<uint32_t>(t.shape.size()));
    for (auto size = t.shape.rbegin(); size != t.shape.rend(); ++size)
      append<uint64_t>(out, static_cast<uint64_t>(*size));
    append<uint32_t>(out, static_cast<uint32_t>(t.type));
    append<uint64_t>(out, offset);
    uint64_t end = 0;
    if (__builtin_add_overflow(offset, bytes, &end) ||
        __builtin_add_overflow(end, alignment - 1, &end))
      refuse(fmt::format("the tensors up to {} exceed 2^64 bytes", in_quotes(t.name)));
    offset = end & ~(alignment - 1);
  }
  return out;
}

uint64_t padding(uint64_t position, uint64_t alignment) {
  return (alignment - position % alignment) % alignment;
}

}  // namespace

uint64_t GgufTensorSpec::bytes() const {
  const auto& traits = ggml_type_traits(type);
  const int64_t row = shape.empty() ? 1 : shape.back();
  const auto count = element_count(shape);
  const auto size = count && row % traits.block == 0
                        ? checked_multiply(*count / traits.block, traits.block_bytes)
                        : std::nullopt;
  if (!size)
    throw Error("GgufTensorSpec",
                fmt::format("tensor {}: {} {} has no size: rows must be a multiple of {}",
                            in_quotes(name), traits.name, shape_text(shape), traits.block));
  return *size;
}

GgufWriter::GgufWriter(const std::filesystem::path& path, const GgufMetadata& metadata,
                       std::vector<GgufTensorSpec> tensors)
    : tensors_(std::move(tensors)), file_(path), alignment_(alignment_of(metadata)) {
  std::string head = "GGUF";
  append<uint32_t>(head, 3);
  append<uint64_t>(head, tensors_.size());
  append<uint64_t>(head, metadata.size());
  head += metadata_bytes(metadata);
  head += info_bytes(tensors_, alignment_);
  file_.write(head);
  file_.pad(padding(file_.written(), alignment_));
  if (!tensors_.empty()) left_ = tensors_[0].bytes();
  finish_tensors();
}

// Pads tensors that are complete, empty ones included, and moves past them.
void GgufWriter::finish_tensors() {
  while (next_ < tensors_.size() && left_ == 0) {
    file_.pad(padding(file_.written(), alignment_));
    if (++next_ < tensors_.size()) left_ = tensors_[next_].bytes();
  }
}

void GgufWriter::write(std::string_view name, const void* data, size_t bytes) {
  if (bytes == 0) return;
  if (next_ == tensors_.size())
    refuse(fmt::format("{}: {} bytes for {}, but every tensor is complete", file_.target().string(),
                       bytes, in_quotes(name)));
  const auto& tensor = tensors_[next_];
  if (tensor.name != name)
    refuse(fmt::format("{}: data for {}, but it is the turn of {}", file_.target().string(),
                       in_quotes(name), in_quotes(tensor.name)));
  if (bytes > left_)
    refuse(fmt::format("{}: {} bytes for {}, of whose {} only {} are still to come",
                       file_.target().string(), bytes, in_quotes(name), tensor.bytes(), left_));
  file_.write(data, bytes);
  left_ -= bytes;
  finish_tensors();
}

void GgufWriter::commit() {
  if (next_ < tensors_.size())
    refuse(fmt::format("{}: {} still lacks {} of {} bytes, {} of {} tensors are complete",
                       file_.target().string(), in_quotes(tensors_[next_].name), left_,
                       tensors_[next_].bytes(), next_, tensors_.size()));
  file_.commit();
}

}  // namespace budwood::io
