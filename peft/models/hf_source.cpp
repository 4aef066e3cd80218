#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/models/hf_source.h>
#include <budwood/peft/tensor_file.h>
#include <budwood/quant/error.h>
#include <map>

namespace budwood::models {
namespace {

// "model.layers.0.mlp.up_proj.weight" -> "model.layers.0.mlp.up_proj."
std::string layer_of(const std::string& name) {
  return name.substr(0, name.rfind('.') + 1);
}

}  // namespace

at::ScalarType most_common_float(const io::ModelFiles& files) {
  std::map<at::ScalarType, uint64_t> bytes;
  for (const auto* info : files.tensors()) {
    const bool plain = info->name.ends_with(".weight") || info->name.ends_with(".bias");
    if (plain && (info->dtype == io::Dtype::f32 || info->dtype == io::Dtype::bf16 ||
                  info->dtype == io::Dtype::f16))
      bytes[scalar_type(info->dtype)] += info->bytes();
  }
  at::ScalarType best = at::kFloat;
  uint64_t most = 0;
  for (const auto& [type, count] : bytes)
    if (count > most) best = type, most = count;
  return best;
}

std::string layer_of_part(const std::string& name) {
  const auto weight = name.find(".weight.");
  return weight == std::string::npos ? layer_of(name) : name.substr(0, weight + 1);
}

HfSource::HfSource(const std::string& folder, std::optional<at::ScalarType> dtype,
                   const std::string& quantization_config, bool as_stored)
    : files_(io::ModelFiles::open(folder)),
      dtype_(dtype ? *dtype : most_common_float(files_)),
      as_stored_(as_stored) {
  if (quantization_config.empty()) return;
  checkpoint_ = quant::open_checkpoint(quantization_config);
  for (const auto* info : files_.tensors()) layers_[layer_of_part(info->name)].push_back(info);
}

bool HfSource::has(const std::string& name) const {
  return files_.find(name) != nullptr || !packed_parts(name).empty();
}

quant::StoredParts HfSource::packed_parts(const std::string& name) const {
  if (!checkpoint_ || !name.ends_with(".weight")) return {};
  const auto path = layer_of(name);
  const auto it = layers_.find(path);
  if (it == layers_.end()) return {};
  quant::StoredParts parts;
  for (const auto* info : it->second)
    if (info->name != path + "bias") parts[info->name.substr(path.size())] = as_tensor(*info);
  return checkpoint_->packed(parts) ? parts : quant::StoredParts{};
}

at::Tensor HfSource::read(const std::string& name, at::IntArrayRef shape) {
  const auto* info = files_.find(name);
  if (!info)
    throw Error("load",
                fmt::format("{}: the tensor '{}' is missing", files_.path().string(), name));
  if (at::IntArrayRef(info->shape) != shape)
    throw Error("load", fmt::format("{}: the tensor '{}' has shape {}, the configuration wants {}",
                                    info->file->path().string(), name, io::shape_text(info->shape),
                                    io::shape_text({shape.data(), shape.size()})));
  used_.insert(name);
  const auto tensor = as_tensor(*info);
  if (!at::isFloatingType(tensor.scalar_type()))
    throw Error("load",
                fmt::format("{}: the tensor '{}' holds {}, wanted floating point values",
                            info->file->path().string(), name, io::dtype_name(info->dtype)));
  return tensor;
}

// A copy lets go of the file's pages: without that, loading in another dtype would hold both.
at::Tensor HfSource::converted(const std::string& name, at::IntArrayRef shape) {
  const auto stored = read(name, shape);
  if (stored.scalar_type() == dtype_) return stored;
  auto values = stored.to(dtype_);
  release(name);
  return values;
}

at::Tensor HfSource::for_products(const std::string& name, at::IntArrayRef shape) {
  if (as_stored_ && dtype_ == at::kFloat) {
    auto stored = read(name, shape);
    if (at::isReducedFloatingType(stored.scalar_type())) return stored;
  }
  return converted(name, shape);
}

quant::Weight HfSource::matrix(const std::string& name, int64_t out, int64_t in) {
  const auto parts = packed_parts(name);
  if (!parts.empty()) {
    const auto path = layer_of(name);
    for (const auto& [part, tensor] : parts) used_.insert(path + part);
    try {
      return checkpoint_->read(parts, out, in);
    } catch (const std::exception& e) {
      throw Error("load", fmt::format("{}: the layer '{}': {}", files_.path().string(),
                                      path.substr(0, path.size() - 1), e.what()));
    }
  }
  return quant::Weight::dense(for_products(name, {out, in}));
}

quant::Weight HfSource::transposed_matrix(const std::string& name, int64_t out, int64_t in) {
  return quant::Weight::dense_transposed(for_products(name, {in, out}));
}

at::Tensor HfSource::vector(const std::string& name, int64_t size) {
  return converted(name, {size});
}

void HfSource::release(const std::string& name) {
  const auto* info = files_.find(name);
  if (info) info->file->release(info->data, info->bytes());
}

std::vector<std::string> HfSource::unused() const {
  std::vector<std::string> names;
  for (const auto* info : files_.tensors())
    if (!used_.contains(info->name)) names.push_back(info->name);
  return names;
}

}  // namespace budwood::models
