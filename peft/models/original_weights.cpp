#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/io/text.h>
#include <budwood/peft/models/original_weights.h>
#include <budwood/peft/tensor_file.h>
#include <budwood/quant/error.h>

namespace budwood::models {

OriginalWeights::OriginalWeights(const std::filesystem::path& path)
    : base_(open_merge_base(path)), layout_(*base_) {}

at::Tensor OriginalWeights::matrix(const std::string& path) const {
  const auto* info = layout_.find(path + ".weight");
  if (info == nullptr && path.ends_with("lm_head")) info = layout_.tied_table();
  if (info == nullptr || info->shape.size() != 2)
    throw Error("original", fmt::format("{} has no matrix {}", base_->path().string(),
                                        io::in_quotes(path + ".weight")));
  at::Tensor matrix;
  if (base_->packed(*info)) {
    matrix = at::empty(info->shape, at::TensorOptions().dtype(at::kFloat));
    base_->open(*info)->read(0, info->shape[0], matrix.mutable_data_ptr<float>());
  } else {
    auto stored = at::empty(info->shape, at::TensorOptions().dtype(scalar_type(info->dtype)));
    base_->read(*info, 0, stored.mutable_data_ptr(), info->bytes());
    matrix = stored.to(at::kFloat);
  }
  return layout_.stores_transposed(path) ? matrix.t().contiguous() : matrix;
}

}  // namespace budwood::models
