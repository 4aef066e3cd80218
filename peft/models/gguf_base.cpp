#include <fmt/format.h>

#include <budwood/peft/io/gguf_tokenizer.h>
#include <budwood/peft/models/gguf_base.h>
#include <budwood/peft/models/gguf_config.h>
#include <budwood/peft/models/gguf_layout.h>
#include <budwood/quant/error.h>
#include <budwood/quant/kernels/gguf_blocks.h>
#include <cmath>

namespace budwood::models {
namespace {

constexpr const char* kRopeDivisors = "rope_freqs.weight";

/// Rows of a tensor in transformers' order.
class GgufRows final : public PackedRows {
 public:
  GgufRows(const io::GgufTensor& tensor, int64_t head_dim, std::string path)
      : tensor_(tensor), head_dim_(head_dim), path_(std::move(path)) {}
  ~GgufRows() override { tensor_.file->release(tensor_.data, tensor_.bytes); }

  void read(int64_t begin, int64_t rows, float* to) const override {
    const int64_t cols = tensor_.shape.back();
    const int64_t width = quant::kernels::row_bytes(tensor_.type, cols);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t from = head_dim_ > 0 ? row_in_gguf(begin + r, head_dim_) : begin + r;
      float* row = to + r * cols;
      quant::kernels::dequantize_row(tensor_.type, tensor_.data + from * width, row, cols);
      for (int64_t i = 0; i < cols; ++i)
        if (!std::isfinite(row[i]))
          throw Error("merge_files", fmt::format("{}: row {} of '{}' holds values that are not "
                                                 "finite",
                                                 path_, from, tensor_.name));
    }
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
    quant::kernels::dequantize_row(tensor_.type, tensor_.data, values.data(), count);
    for (int64_t i = 0; i < count; ++i)
      to[i] = values[static_cast<size_t>(head_dim_ > 0 ? row_in_gguf(i, head_dim_) : i)];
  }

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

GgufBase::GgufBase(const std::filesystem::path& path) : GgufBase(io::GgufFile::open(path)) {}

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
  return {
      fmt::format("{} has no place in a Hugging Face folder: positions beyond the original "
                  "context are rotated differently",
                  kRopeDivisors)};
}

}  // namespace budwood::models
