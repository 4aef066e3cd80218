#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/models/hf_source.h>
#include <budwood/peft/tensor_file.h>
#include <budwood/quant/error.h>
#include <map>

namespace budwood::models {
namespace {

// The dtype of activations is that of the weights, so one table of a model decides for all.
at::ScalarType most_common_float(const io::ModelFiles& files) {
  std::map<at::ScalarType, uint64_t> bytes;
  for (const auto* info : files.tensors())
    if (info->dtype == io::Dtype::f32 || info->dtype == io::Dtype::bf16 ||
        info->dtype == io::Dtype::f16)
      bytes[scalar_type(info->dtype)] += info->bytes();
  at::ScalarType best = at::kFloat;
  uint64_t most = 0;
  for (const auto& [type, count] : bytes)
    if (count > most) best = type, most = count;
  return best;
}

}  // namespace

HfSource::HfSource(const std::string& folder, std::optional<at::ScalarType> dtype)
    : files_(io::ModelFiles::open(folder)), dtype_(dtype ? *dtype : most_common_float(files_)) {}

bool HfSource::has(const std::string& name) const {
  return files_.find(name) != nullptr;
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

quant::Weight HfSource::matrix(const std::string& name, int64_t out, int64_t in) {
  return quant::Weight::dense(read(name, {out, in}).to(dtype_));
}

at::Tensor HfSource::vector(const std::string& name, int64_t size) {
  return read(name, {size}).to(dtype_);
}

std::vector<std::string> HfSource::unused() const {
  std::vector<std::string> names;
  for (const auto* info : files_.tensors())
    if (!used_.contains(info->name)) names.push_back(info->name);
  return names;
}

}  // namespace budwood::models
