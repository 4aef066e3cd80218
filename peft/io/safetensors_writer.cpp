#include <budwood/peft/io/safetensors.h>
#include <budwood/peft/io/text.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <unordered_set>

namespace budwood::io {
namespace {

constexpr std::string_view kWhere = "SafetensorsWriter";
constexpr uint64_t kMaxHeader = 100'000'000;

std::string json_string(const std::string& text) {
  if (!is_utf8(text))
    throw Error(kWhere,
                fmt::format("{} is not valid UTF-8 and cannot be written", in_quotes(text)));
  return nlohmann::json(text).dump();
}

std::string shape_json(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ","));
}

// The length and the JSON, padded so that the data begins at a multiple of 8.
std::string header(const std::vector<TensorSpec>& order, const Metadata& metadata) {
  std::string text = "{";
  if (!metadata.empty()) {
    text += "\"__metadata__\":{";
    bool first = true;
    for (const auto& [key, value] : metadata) {
      text += (first ? "" : ",") + json_string(key) + ":" + json_string(value);
      first = false;
    }
    text += "}";
  }
  uint64_t begin = 0;
  for (const auto& t : order) {
    uint64_t end = 0;
    if (__builtin_add_overflow(begin, t.bytes(), &end))
      throw Error(kWhere, fmt::format("the tensors up to {} exceed 2^64 bytes", in_quotes(t.name)));
    text += fmt::format(R"({}{}:{{"dtype":"{}","shape":{},"data_offsets":[{},{}]}})",
                        text.size() > 1 ? "," : "", json_string(t.name), dtype_name(t.dtype),
                        shape_json(t.shape), begin, end);
    begin = end;
  }
  text += "}";
  text.resize((text.size() + 7) / 8 * 8, ' ');
  if (text.size() > kMaxHeader)
    throw Error(kWhere, fmt::format("a header of {} bytes, readers allow at most {}", text.size(),
                                    kMaxHeader));
  std::string length(8, '\0');
  for (size_t i = 0; i < 8; ++i) length[i] = static_cast<char>(text.size() >> (8 * i) & 0xff);
  return length + text;
}

}  // namespace

std::vector<TensorSpec> in_reference_order(std::vector<TensorSpec> tensors) {
  std::sort(tensors.begin(), tensors.end(), [](const TensorSpec& a, const TensorSpec& b) {
    return a.dtype != b.dtype ? a.dtype < b.dtype : a.name < b.name;
  });
  std::unordered_set<std::string_view> names;
  for (const auto& t : tensors) {
    if (t.name.empty() || t.name == "__metadata__")
      throw Error(kWhere, fmt::format("{} cannot name a tensor", in_quotes(t.name)));
    if (!names.insert(t.name).second)
      throw Error(kWhere, fmt::format("two tensors are called {}", in_quotes(t.name)));
  }
  return tensors;
}

uint64_t TensorSpec::bytes() const {
  const auto count = element_count(shape);
  const auto size = count ? byte_count(dtype, *count) : std::nullopt;
  if (!size)
    throw Error("TensorSpec", fmt::format("tensor {}: {} {} has no size in whole bytes",
                                          in_quotes(name), dtype_name(dtype), shape_text(shape)));
  return *size;
}

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path,
                                     std::vector<TensorSpec> tensors, const Metadata& metadata)
    : order_(in_reference_order(std::move(tensors))), file_(path) {
  file_.write(header(order_, metadata));
  if (!order_.empty()) left_ = order_[0].bytes();
  skip_complete();
}

// Moves past tensors that are complete, empty ones included.
void SafetensorsWriter::skip_complete() {
  while (next_ < order_.size() && left_ == 0)
    if (++next_ < order_.size()) left_ = order_[next_].bytes();
}

void SafetensorsWriter::write(std::string_view name, const void* data, size_t bytes) {
  if (bytes == 0 &&
      std::any_of(order_.begin(), order_.end(), [&](const auto& t) { return t.name == name; }))
    return;  // an empty tensor, or an empty piece
  if (next_ == order_.size())
    throw Error(kWhere, fmt::format("{}: {} bytes for {}, but every tensor is complete",
                                    file_.target().string(), bytes, in_quotes(name)));
  const auto& tensor = order_[next_];
  if (tensor.name != name)
    throw Error(kWhere,
                fmt::format("{}: data for {}, but it is the turn of {}", file_.target().string(),
                            in_quotes(name), in_quotes(tensor.name)));
  if (bytes > left_)
    throw Error(kWhere, fmt::format("{}: {} bytes for {}, of whose {} only {} are still to come",
                                    file_.target().string(), bytes, in_quotes(name), tensor.bytes(),
                                    left_));
  file_.write(data, bytes);
  left_ -= bytes;
  skip_complete();
}

void SafetensorsWriter::commit() {
  if (next_ < order_.size())
    throw Error(kWhere, fmt::format("{}: {} still lacks {} of {} bytes, {} of {} tensors are "
                                    "complete",
                                    file_.target().string(), in_quotes(order_[next_].name), left_,
                                    order_[next_].bytes(), next_, order_.size()));
  file_.commit();
}

void write_safetensors(const std::filesystem::path& path, const std::vector<TensorData>& tensors,
                       const Metadata& metadata) {
  std::vector<TensorSpec> specs;
  std::unordered_map<std::string_view, std::span<const std::byte>> data;
  for (const auto& t : tensors) {
    if (t.data.size() != t.spec.bytes())
      throw Error("write_safetensors",
                  fmt::format("tensor {}: {} bytes given, {} {} needs {}", in_quotes(t.spec.name),
                              t.data.size(), dtype_name(t.spec.dtype), shape_text(t.spec.shape),
                              t.spec.bytes()));
    specs.push_back(t.spec);
    data.emplace(t.spec.name, t.data);
  }
  SafetensorsWriter writer(path, std::move(specs), metadata);
  for (const auto& t : writer.order()) {
    const auto bytes = data.at(t.name);
    writer.write(t.name, bytes.data(), bytes.size());
  }
  writer.commit();
}

}  // namespace budwood::io
