#include <fmt/format.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <budwood/peft/io/dtype.h>
#include <budwood/peft/scoped_weight_delta.h>
#include <budwood/quant/error.h>
#include <algorithm>

namespace budwood {
namespace {

std::string text(const at::Tensor& tensor) {
  return io::shape_text({tensor.sizes().data(), tensor.sizes().size()});
}

// Null for a layer that has no such member, or whose groups no product of factors has.
at::Tensor* weight_of(torch::nn::Module& layer) {
  const auto plain = [](auto* conv) { return conv && conv->options.groups() == 1; };
  if (auto* linear = dynamic_cast<torch::nn::LinearImpl*>(&layer)) return &linear->weight;
  if (auto* table = dynamic_cast<torch::nn::EmbeddingImpl*>(&layer)) return &table->weight;
  if (auto* one = dynamic_cast<torch::nn::Conv1dImpl*>(&layer); plain(one)) return &one->weight;
  if (auto* two = dynamic_cast<torch::nn::Conv2dImpl*>(&layer); plain(two)) return &two->weight;
  if (auto* three = dynamic_cast<torch::nn::Conv3dImpl*>(&layer); plain(three))
    return &three->weight;
  return nullptr;
}

at::Tensor changed(const at::Tensor& weight, const WeightDelta& delta) {
  const auto refuse = [&] {
    throw Error("ScopedWeightDelta",
                fmt::format("'{}': factors {} and {} do not make a weight of {}", delta.path,
                            text(delta.a), text(delta.b), text(weight)));
  };
  if (delta.a.dim() < 2 || delta.b.dim() < 2) refuse();
  const auto a = delta.a.flatten(1), b = delta.b.flatten(1);
  if (b.size(0) != weight.size(0) || b.size(1) != a.size(0) ||
      b.size(0) * a.size(1) != weight.numel())
    refuse();
  return weight + (delta.scaling * b.mm(a)).view(weight.sizes()).to(weight.scalar_type());
}

}  // namespace

ScopedWeightDelta::ScopedWeightDelta(torch::nn::Module& model,
                                     const std::vector<WeightDelta>& deltas) {
  const auto layers = model.named_modules("", /*include_self=*/false);
  std::vector<at::Tensor> weights;
  for (const auto& delta : deltas) {
    const auto* layer = layers.find(delta.path);
    auto* member = layer ? weight_of(**layer) : nullptr;
    if (!member)
      throw Error("ScopedWeightDelta",
                  fmt::format("'{}' is {}; wanted is a torch::nn::Linear, Embedding or a "
                              "convolution with groups=1",
                              delta.path, layer ? (*layer)->name() : "no module of the model"));
    if (std::any_of(held_.begin(), held_.end(), [&](const auto& h) { return h.member == member; }))
      throw Error("ScopedWeightDelta", fmt::format("'{}' is named twice", delta.path));
    held_.push_back({*layer, member, *member});
    weights.push_back(changed(*member, delta));
  }
  for (size_t i = 0; i < held_.size(); ++i) *held_[i].member = weights[i];
}

ScopedWeightDelta::~ScopedWeightDelta() {
  for (auto& one : held_) *one.member = one.weight;
}

}  // namespace budwood
