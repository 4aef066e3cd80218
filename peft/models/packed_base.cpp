#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/models/hf_source.h>
#include <budwood/peft/models/packed_base.h>
#include <budwood/peft/tensor_file.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

namespace budwood::models {
namespace {

// Parts up to this size are settings, which tell the shape of the matrix.
constexpr uint64_t kSettingsBytes = 4096;

class WeightRows final : public PackedRows {
 public:
  explicit WeightRows(quant::Weight weight) : weight_(std::move(weight)) {}
  void read(int64_t begin, int64_t rows, float* to) const override {
    const at::NoGradGuard no_grad;
    const auto values = weight_.rows(begin, begin + rows, at::kFloat).contiguous();
    std::copy_n(values.const_data_ptr<float>(), values.numel(), to);
  }
  PackedLevels levels() const override {
    switch (weight_.format) {
      case quant::Format::nf4:  // the widest gap is that between -1 and its neighbour
        return {.block = weight_.parts[2].item<int64_t>(), .share = 0.30381};
      case quant::Format::fp4:
        return {.block = weight_.parts[2].item<int64_t>(), .share = 1.0 / 3};
      case quant::Format::int8_rows:
        return {.share = 1.0 / 127};
      case quant::Format::affine4:
        return {.block = group(), .share = 1.0 / 15, .of_range = true};
      case quant::Format::affine8:
        return {.block = group(), .share = 1.0 / 255, .of_range = true};
      default:
        return {};
    }
  }

 private:
  // Where columns are stored in another order, groups lie anywhere in a row.
  int64_t group() const { return weight_.parts.size() > 4 ? 0 : weight_.parts[3].item<int64_t>(); }
  quant::Weight weight_;
};

const bool registered =
    register_merge_base([](const std::filesystem::path& path) -> std::unique_ptr<MergeBase> {
      if (!std::filesystem::is_directory(path) || quantization_of(read_config_text(path)).empty())
        return nullptr;
      return std::make_unique<PackedBase>(path);
    });

}  // namespace

PackedBase::PackedBase(const std::filesystem::path& folder)
    : MergeBase(folder, read_config_text(folder)),
      files_(io::ModelFiles::open(folder, io::Access::headers)) {
  const auto quantization = quantization_of(config());
  checkpoint_ = quant::open_checkpoint(quantization);
  method_ = nlohmann::json::parse(quantization).value("quant_method", "");
  std::map<std::string, Layer> layers;
  for (const auto* tensor : files_.tensors()) {
    const auto path = layer_of_part(tensor->name);
    if (tensor->name == path + "bias") continue;
    layers[path].path = path;
    layers[path].parts.push_back(tensor);
  }
  // What plain weights are stored in decides for what codes stand for.
  const auto dtype = stored_dtype(most_common_float(files_));
  std::set<std::string> packed;
  for (const auto* tensor : files_.tensors()) {
    const auto it = layers.find(layer_of_part(tensor->name));
    const bool of_layer = it != layers.end() && tensor->name != it->first + "bias";
    if (of_layer && packed.contains(it->first)) continue;
    const bool first = of_layer && tensor == it->second.parts[0];
    const auto parts = first ? described_parts(it->second) : quant::StoredParts{};
    if (!first || !checkpoint_->packed(parts)) {
      tensors_.push_back(tensor);
      continue;
    }
    const auto& layer = it->second;
    packed.insert(layer.path);
    const auto name = layer.path + "weight";
    try {
      const auto [out, in] = checkpoint_->shape(parts);
      const io::TensorSpec spec{name, dtype, {out, in}};
      infos_.push_back({.name = name, .dtype = dtype, .shape = spec.shape, .end = spec.bytes()});
    } catch (const std::exception& e) {
      throw Error("merge_files",
                  fmt::format("{}: the layer '{}': {}", folder.string(), name, e.what()));
    }
    tensors_.push_back(&infos_.back());
    layers_.emplace(&infos_.back(), layer);
  }
  for (const auto* tensor : tensors_) index_[tensor->name] = tensor;
}

const io::TensorInfo* PackedBase::find(std::string_view name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : it->second;
}

quant::StoredParts PackedBase::described_parts(const Layer& layer) const {
  quant::StoredParts parts;
  for (const auto* part : layer.parts) {
    auto options = at::TensorOptions().dtype(scalar_type(part->dtype));
    const bool settings = part->bytes() <= kSettingsBytes;
    auto tensor = at::empty(part->shape, settings ? options : options.device(at::kMeta));
    if (settings) files_.read(*part, 0, tensor.mutable_data_ptr(), part->bytes());
    parts[part->name.substr(layer.path.size())] = tensor;
  }
  return parts;
}

quant::StoredParts PackedBase::parts(const Layer& layer) const {
  quant::StoredParts parts;
  for (const auto* part : layer.parts) {
    auto tensor = at::empty(part->shape, at::TensorOptions().dtype(scalar_type(part->dtype)));
    files_.read(*part, 0, tensor.mutable_data_ptr(), part->bytes());
    parts[part->name.substr(layer.path.size())] = tensor;
  }
  return parts;
}

quant::Weight PackedBase::weight(const io::TensorInfo& tensor) const {
  try {
    return checkpoint_->read(parts(layer(tensor)), tensor.shape[0], tensor.shape[1]);
  } catch (const std::exception& e) {
    throw Error("merge_files",
                fmt::format("{}: the layer '{}': {}", path().string(), tensor.name, e.what()));
  }
}

std::unique_ptr<PackedRows> PackedBase::open(const io::TensorInfo& tensor) const {
  return std::make_unique<WeightRows>(weight(tensor));
}

quant::Weight PackedBase::rescaled(const io::TensorInfo& tensor, const FoldTerm& term,
                                   double weight) const {
  auto w = this->weight(tensor);
  const auto place = [&](const FloatArray& array, at::Tensor& part, const char* what) {
    if (at::IntArrayRef(array.shape) != part.sizes())
      throw Error("merge_files",
                  fmt::format("{}: the adapter's {} are {}, the model's are {}", tensor.name, what,
                              io::shape_text(array.shape), io::shape_text(part.sizes().vec())));
    const auto values =
        at::from_blob(const_cast<float*>(array.values.data()), array.shape, at::kFloat).clone();
    const auto first = part.to(at::kFloat);
    part = weight == 1.0 ? values : first + weight * (values - first);
  };
  if (w.format != quant::Format::affine4 && w.format != quant::Format::affine8)
    MergeBase::open_rescaled(tensor, term, weight);  // says what is wanted
  place(term.scales, w.parts[1], "scales");
  if (term.zeros.defined()) place(term.zeros, w.parts[2], "zero points");
  return w;
}

std::unique_ptr<PackedRows> PackedBase::open_rescaled(const io::TensorInfo& tensor,
                                                      const FoldTerm& term, double weight) const {
  if (!packed(tensor)) return MergeBase::open_rescaled(tensor, term, weight);
  return std::make_unique<WeightRows>(rescaled(tensor, term, weight));
}

void PackedBase::carry_over(const std::filesystem::path& folder) const {
  carry_other_files(path(), folder);
}

}  // namespace budwood::models
