#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/peft/models/gguf_config.h>
#include <budwood/peft/models/gguf_layout.h>
#include <budwood/peft/models/gguf_source.h>
#include <budwood/quant/error.h>
#include <budwood/quant/kernels/gguf_blocks.h>
#include <budwood/quant/kernels/half.h>
#include <atomic>
#include <bit>
#include <limits>

namespace budwood::models {
namespace {

// Calls use(row, values [cols]) for all rows, from several threads.
template <class Use>
void for_rows(const io::GgufTensor& tensor, const Use& use) {
  const auto type = tensor.type;
  const int64_t rows = tensor.shape.size() > 1 ? tensor.shape[0] : 1, cols = tensor.shape.back();
  const int64_t bytes = quant::kernels::row_bytes(type, cols);
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> values(static_cast<size_t>(cols));
    for (int64_t r = begin; r < end; ++r) {
      quant::kernels::dequantize_row(type, tensor.data + r * bytes, values.data(), cols);
      use(r, values);
    }
  });
}

at::Tensor decode(const io::GgufTensor& tensor, at::ScalarType dtype) {
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf)
    return decode(tensor, at::kFloat).to(dtype);
  auto result = at::empty(tensor.shape, at::TensorOptions().dtype(dtype));
  const int64_t cols = tensor.shape.back();
  auto* base = static_cast<char*>(result.mutable_data_ptr());
  for_rows(tensor, [&](int64_t r, const std::vector<float>& values) {
    auto* row = base + r * cols * result.element_size();
    if (dtype == at::kBFloat16)
      quant::kernels::fp32_to_bf16(values.data(), reinterpret_cast<uint16_t*>(row), cols);
    else if (dtype == at::kHalf)
      quant::kernels::fp32_to_fp16(values.data(), reinterpret_cast<uint16_t*>(row), cols);
    else
      std::memcpy(row, values.data(), static_cast<size_t>(cols) * sizeof(float));
  });
  return result;
}

bool all_finite(const io::GgufTensor& tensor) {
  std::atomic<bool> finite{true};
  for_rows(tensor, [&](int64_t, const std::vector<float>& values) {
    uint32_t bad = 0;
    for (const float value : values)
      bad |= (std::bit_cast<uint32_t>(value) & 0x7f800000u) == 0x7f800000u;
    if (bad) finite = false;
  });
  return finite;
}

[[noreturn]] void refuse_not_finite(const io::GgufTensor& tensor, const std::string& path) {
  throw Error("load", fmt::format("{}: the tensor '{}' holds values that are not finite", path,
                                  tensor.name));
}

// The rows as they lie in the mapped file: floats where they are floats, else the bytes of blocks.
at::Tensor stored_rows(const io::GgufTensor& tensor) {
  auto type = at::kByte;
  if (tensor.type == io::GgmlType::f32) type = at::kFloat;
  if (tensor.type == io::GgmlType::f16) type = at::kHalf;
  if (tensor.type == io::GgmlType::bf16) type = at::kBFloat16;
  const auto width = static_cast<int64_t>(c10::elementSize(type));
  const std::vector<int64_t> shape = {tensor.shape[0],
                                      static_cast<int64_t>(tensor.bytes) / tensor.shape[0] / width};
  auto* data = const_cast<std::byte*>(tensor.data);  // the mapping is private: writes are copied
  auto view = at::from_blob(
      data, shape, [file = tensor.file](void*) {}, at::TensorOptions().dtype(type));
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(width) == 0 ? view
                                                                                : view.clone();
}

}  // namespace

GgufSource::GgufSource(const std::string& path, at::ScalarType dtype, bool packed)
    : file_(io::GgufFile::open(path)),
      config_(read_gguf_config(file_)),
      dtype_(dtype),
      packed_(packed),
      permuted_(file_.get_string("general.architecture") == "llama") {
  used_.insert(kRopeDivisors);
}

bool GgufSource::has(const std::string& name) const {
  return file_.find(gguf_name(name)) != nullptr;
}

const io::GgufTensor& GgufSource::find(const std::string& name, at::IntArrayRef shape) {
  const auto theirs = gguf_name(name);
  const auto* tensor = file_.find(theirs);
  if (!tensor)
    throw Error("load",
                fmt::format("{}: the tensor '{}' is missing", file_.path().string(), theirs));
  if (at::IntArrayRef(tensor->shape) != shape)
    throw Error("load", fmt::format("{}: the tensor '{}' has shape [{}], the metadata want [{}]",
                                    file_.path().string(), theirs, fmt::join(tensor->shape, ", "),
                                    fmt::join(shape.vec(), ", ")));
  io::require_decodable(tensor->type, tensor->name, file_.path().string());
  used_.insert(theirs);
  return *tensor;
}

at::Tensor GgufSource::in_rotary_order(const std::string& name, const at::Tensor& rows) const {
  return permuted_ && rotary_rows(name) ? rows_from_gguf(rows, config_.head_dim) : rows;
}

at::Tensor GgufSource::read(const std::string& name, at::IntArrayRef shape) {
  const auto& tensor = find(name, shape);
  const auto values = decode(tensor, dtype_);
  tensor.file->release(tensor.data, tensor.bytes);
  if (!values.isfinite().all().item<bool>()) refuse_not_finite(tensor, file_.path().string());
  return in_rotary_order(name, values);
}

quant::Weight GgufSource::matrix(const std::string& name, int64_t out, int64_t in) {
  if (!packed_) return quant::Weight::dense(read(name, {out, in}));
  const auto& tensor = find(name, {out, in});
  if (!all_finite(tensor)) refuse_not_finite(tensor, file_.path().string());
  const auto rows = in_rotary_order(name, stored_rows(tensor));
  if (rows.is_floating_point()) return quant::Weight::dense(rows);
  return quant::Weight::from_parts({rows}, static_cast<int64_t>(gguf_format(tensor.type)), out, in);
}

at::Tensor GgufSource::vector(const std::string& name, int64_t size) {
  return read(name, {size});
}

std::vector<std::string> GgufSource::unused() const {
  std::vector<std::string> names;
  for (const auto& tensor : file_.tensors())
    if (!used_.contains(tensor.name)) names.push_back(tensor.name);
  return names;
}

}  // namespace budwood::models
