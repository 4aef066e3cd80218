#include <fmt/format.h>

#include <budwood/peft/io/gguf_tokenizer.h>
#include <budwood/peft/kernels/fold.h>
#include <budwood/peft/models/gguf_base.h>
#include <budwood/peft/models/gguf_config.h>
#include <budwood/peft/models/gguf_layout.h>
#include <budwood/peft/models/rope.h>
#include <budwood/quant/error.h>
#include <budwood/quant/kernels/gguf_blocks.h>
#include <cmath>
#include <optional>

namespace budwood::models {
namespace {

using io::GgmlType;
using quant::kernels::FloatType;

std::optional<FloatType> float_type(GgmlType type) {
  if (type == GgmlType::f32) return FloatType::fp32;
  if (type == GgmlType::f16) return FloatType::fp16;
  if (type == GgmlType::bf16) return FloatType::bf16;
  return {};
}

// Levels of blocks, or of the parts of blocks that have scales of their own.
PackedLevels gguf_levels(GgmlType type) {
  switch (type) {
    case GgmlType::f16:
      return {.dtype = io::Dtype::f16};
    case GgmlType::bf16:
      return {.dtype = io::Dtype::bf16};
    case GgmlType::q4_0:
      return {.block = 32, .share = 1.0 / 8};
    case GgmlType::q5_0:
      return {.block = 32, .share = 1.0 / 16};
    case GgmlType::q8_0:
      return {.block = 32, .share = 1.0 / 127};
    case GgmlType::q4_1:
    case GgmlType::q4_k:
      return {.block = 32, .share = 1.0 / 15, .of_range = true};
    case GgmlType::q5_1:
    case GgmlType::q5_k:
      return {.block = 32, .share = 1.0 / 31, .of_range = true};
    case GgmlType::q6_k:
      return {.block = 16, .share = 1.0 / 32};
    default:
      return {};
  }
}

/// Rows of a tensor in transformers' order.
class GgufRows final : public PackedRows {
 public:
  GgufRows(const io::GgufTensor& tensor, int64_t head_dim, std::string path)
      : tensor_(tensor), head_dim_(head_dim), path_(std::move(path)) {}

  void read(int64_t begin, int64_t rows, float* to) const override {
    const int64_t cols = tensor_.shape.back();
    const int64_t width = quant::kernels::row_bytes(tensor_.type, cols);
    const auto at_once = head_dim_ > 0 ? 1 : rows;
    std::vector<std::byte> bytes(static_cast<size_t>(at_once * width));
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t from = head_dim_ > 0 ? row_in_gguf(begin + r, head_dim_) : begin + r;
      if (r % at_once == 0)
        tensor_.read(static_cast<uint64_t>(from * width), bytes.data(), bytes.size());
      float* row = to + r * cols;
      quant::kernels::dequantize_row(tensor_.type, bytes.data() + r % at_once * width, row, cols);
      for (int64_t i = 0; i < cols; ++i)
        if (!std::isfinite(row[i]))
          throw Error("merge_files", fmt::format("{}: row {} of '{}' holds values that are not "
                                                 "finite",
                                                 path_, from, tensor_.name));
    }
  }

  PackedLevels levels() const override { return gguf_levels(tensor_.type); }
  bool round(double* values, int64_t cols) const override {
    std::vector<std::byte> bytes(
        static_cast<size_t>(quant::kernels::row_bytes(tensor_.type, cols)));
    return encode_row(tensor_.type, values, cols, bytes.data(), values);
  }

 private:
  const io::GgufTensor& tensor_;
  int64_t head_dim_;
  std::string path_;
};

/// A vector of a value per row of a head, which is one row.
class GgufVector final : public PackedRows {
 public:
  GgufVector(const io::GgufTensor& tensor, int64_t head_dim)
      : tensor_(tensor), head_dim_(head_dim) {}
  void read(int64_t, int64_t, float* to) const override {
    const int64_t count = tensor_.shape.back();
    std::vector<float> values(static_cast<size_t>(count));
    std::vector<std::byte> bytes(tensor_.bytes);
    tensor_.read(0, bytes.data(), bytes.size());
    quant::kernels::dequantize_row(tensor_.type, bytes.data(), values.data(), count);
    for (int64_t i = 0; i < count; ++i)
      to[i] = values[static_cast<size_t>(head_dim_ > 0 ? row_in_gguf(i, head_dim_) : i)];
  }
  PackedLevels levels() const override { return gguf_levels(tensor_.type); }

 private:
  const io::GgufTensor& tensor_;
  int64_t head_dim_;
};

const bool registered =
    register_merge_base([](const std::filesystem::path& path) -> std::unique_ptr<MergeBase> {
      if (std::filesystem::is_directory(path) || path.extension() != ".gguf") return nullptr;
      return std::make_unique<GgufBase>(path);
    });

}  // namespace

bool encode_row(GgmlType type, const double* values, int64_t cols, std::byte* bytes,
                double* written) {
  if (const auto plain = float_type(type)) {
    if (!kernels::round_once(values, *plain, bytes, cols)) return false;
    kernels::widen(*plain, bytes, written, cols);
    return true;
  }
  if (!quant::kernels::ggml_type_traits(type).writable) return false;
  std::vector<float> row(values, values + cols);
  if (!quant::kernels::quantize_row(type, row.data(), bytes, cols).ok()) return false;
  quant::kernels::dequantize_row(type, bytes, row.data(), cols);
  std::copy(row.begin(), row.end(), written);
  return true;
}

GgufBase::GgufBase(const std::filesystem::path& path)
    : GgufBase(io::GgufFile::open(path, io::Access::headers)) {}

GgufBase::GgufBase(io::GgufFile file)
    : MergeBase(file.path(), read_gguf_config(file).to_json("float32")),
      file_(std::move(file)),
      model_config_(read_gguf_config(file_)),
      permuted_(file_.get_string("general.architecture") == "llama") {
  for (const auto& tensor : file_.tensors()) {
    if (tensor.name == kRopeDivisors) continue;
    const auto name = name_from_gguf(tensor.name);
    if (!name)
      throw Error("merge_files", fmt::format("{}: '{}' has no counterpart in transformers",
                                             file_.path().string(), tensor.name));
    io::require_decodable(tensor.type, tensor.name, file_.path().string());
    const io::TensorSpec spec{*name, io::Dtype::f32, tensor.shape};
    infos_.push_back(
        {.name = *name, .dtype = spec.dtype, .shape = spec.shape, .end = spec.bytes()});
    tensors_.push_back(&infos_.back());
    stored_[&infos_.back()] = &tensor;
  }
}

const io::TensorInfo* GgufBase::find(std::string_view name) const {
  for (const auto* tensor : tensors_)
    if (tensor->name == name) return tensor;
  return nullptr;
}

void GgufBase::read(const io::TensorInfo& tensor, uint64_t, void*, size_t) const {
  throw Error("merge_files", fmt::format("'{}' is read by rows", tensor.name));
}

std::unique_ptr<PackedRows> GgufBase::open(const io::TensorInfo& tensor) const {
  const auto& found = stored(tensor);
  const int64_t head_dim = permuted_ && rotary_rows(tensor.name) ? model_config_.head_dim : 0;
  if (found.shape.size() == 1) return std::make_unique<GgufVector>(found, head_dim);
  return std::make_unique<GgufRows>(found, head_dim, file_.path().string());
}

void GgufBase::carry_over(const std::filesystem::path& folder) const {
  if (file_.get_string("tokenizer.ggml.model", "no_vocab") != "no_vocab")
    io::write_tokenizer(file_, folder);
}

std::vector<std::string> GgufBase::warnings() const {
  if (file_.find(kRopeDivisors) == nullptr) return {};
  if (llama3_of(model_config_.rope, model_config_.head_dim)) return {};
  return {
      fmt::format("{} has no place in a Hugging Face folder: positions beyond the original "
                  "context are rotated differently",
                  kRopeDivisors)};
}

}  // namespace budwood::models
