#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/ops/lora_linear.h>
#include <budwood/peft/slot.h>
#include <budwood/quant/error.h>
#include <budwood/quant/ops.h>
#include <algorithm>

namespace budwood {
namespace {

// Rows of a weight that are widened to fp64 at a time while merging.
constexpr int64_t kMergePanelElements = 1 << 20;

template <typename Range>
std::string join(const Range& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text.empty() ? "none" : text;
}

std::string part_name(size_t i) {
  return i == 0 ? "weight" : fmt::format("weight_{}", i);
}

}  // namespace

LinearSlotImpl::LinearSlotImpl(quant::Weight weight, at::Tensor bias) {
  for (size_t i = 0; i < weight.parts.size(); ++i)
    register_parameter(part_name(i), weight.parts[i], /*requires_grad=*/false);
  if (bias.defined()) register_parameter("bias", bias, /*requires_grad=*/false);
  weight_ = std::move(weight);
  bias_ = std::move(bias);
}

std::vector<LinearAdapter*> LinearSlotImpl::running() const {
  std::vector<LinearAdapter*> found;
  if (enabled_ && merged_.empty())
    for (const auto& entry : adapters_)
      if (std::find(active_.begin(), active_.end(), entry.name) != active_.end())
        found.push_back(entry.adapter.get());
  return found;
}

at::Tensor LinearSlotImpl::forward(const at::Tensor& x) {
  if (observer_) observer_(x);
  const auto adapters = running();
  if (adapters.empty()) {
    const auto bias = bias_.defined() ? std::optional(bias_) : std::nullopt;
    return quant::linear(x, weight_, bias);
  }
  return with_adapters(x, adapters);
}

at::Tensor LinearSlotImpl::with_adapters(const at::Tensor& x,
                                         const std::vector<LinearAdapter*>& running) {
  const auto bias = bias_.defined() ? std::optional(bias_) : std::nullopt;
  auto first = running.begin();
  at::Tensor y;
  if (const auto term = (*first)->low_rank()) {
    y = ops::lora_linear(x, weight_, bias, term->a, term->b, term->scaling);
    ++first;
  } else {
    y = quant::linear(x, weight_, bias);
  }
  for (; first != running.end(); ++first) y = (*first)->forward(*this, x, std::move(y));
  return y;
}

std::optional<ops::Projection> LinearSlotImpl::projection() const {
  if (observer_) return {};
  for (const auto& part : weight_.parts)
    if (part.requires_grad()) return {};
  const auto adapters = running();
  if (adapters.empty()) return ops::Projection{.weight = weight_, .bias = bias_};
  if (adapters.size() > 1) return {};
  const auto term = adapters[0]->low_rank();
  if (!term) return {};
  return ops::Projection{
      .weight = weight_, .bias = bias_, .a = term->a, .b = term->b, .scaling = term->scaling};
}

std::vector<at::Tensor> forward_together(const ops::Source& source,
                                         const std::vector<LinearSlot>& slots) {
  std::vector<ops::Projection> projections;
  for (const auto& slot : slots) {
    auto projection = slot->projection();
    if (!projection) break;
    projections.push_back(std::move(*projection));
  }
  if (projections.size() == slots.size()) return ops::project(source, projections);
  std::vector<at::Tensor> results;
  const auto x = source.value();
  for (const auto& slot : slots) results.push_back(slot.ptr()->forward(x));
  return results;
}

void LinearSlotImpl::attach(const std::string& name, std::shared_ptr<LinearAdapter> adapter) {
  if (this->adapter(name))
    throw Error("attach", fmt::format("an adapter named '{}' is attached already; attached: {}",
                                      name, join(adapter_names())));
  if (!merged_.empty())
    throw Error("attach", fmt::format("'{}' cannot be attached while {} is merged: unmerge first",
                                      name, join(merged_)));
  register_module("adapter_" + name, adapter);
  adapters_.push_back({name, std::move(adapter)});
  active_.push_back(name);
}

void LinearSlotImpl::detach(const std::string& name) {
  const auto it = std::find_if(adapters_.begin(), adapters_.end(),
                               [&](const Entry& entry) { return entry.name == name; });
  if (it == adapters_.end())
    throw Error("detach",
                fmt::format("no adapter named '{}'; attached: {}", name, join(adapter_names())));
  if (std::find(merged_.begin(), merged_.end(), name) != merged_.end())
    throw Error("detach", fmt::format("'{}' is merged into the weight: unmerge first", name));
  unregister_module("adapter_" + name);
  adapters_.erase(it);
  std::erase(active_, name);
}

std::shared_ptr<LinearAdapter> LinearSlotImpl::adapter(const std::string& name) const {
  for (const auto& entry : adapters_)
    if (entry.name == name) return entry.adapter;
  return nullptr;
}

std::vector<std::string> LinearSlotImpl::adapter_names() const {
  std::vector<std::string> names;
  for (const auto& entry : adapters_) names.push_back(entry.name);
  return names;
}

void LinearSlotImpl::set_active(const std::vector<std::string>& names) {
  active_.clear();
  for (const auto& name : names)
    if (adapter(name)) active_.push_back(name);
}

void LinearSlotImpl::merge(const std::vector<std::string>& names) {
  if (!merged_.empty())
    throw Error("merge", fmt::format("{} is merged already: unmerge first", join(merged_)));
  std::vector<const LinearAdapter*> folded;
  for (const auto& name : names)
    if (const auto found = adapter(name)) folded.push_back(found.get());
  if (folded.empty()) return;

  at::NoGradGuard no_grad;
  const auto dtype = weight_.dtype();
  auto merged = at::empty({weight_.out, weight_.in}, weight_.parts[0].options().dtype(dtype));
  const int64_t step = std::max<int64_t>(1, kMergePanelElements / weight_.in);
  for (int64_t begin = 0; begin < weight_.out; begin += step) {
    const int64_t end = std::min(weight_.out, begin + step);
    auto rows = weight_.rows(begin, end, at::kDouble).clone();
    for (const auto* one : folded) rows = one->merge_rows(rows, begin);
    const auto rounded = rows.to(dtype);
    if (!rounded.isfinite().all().item<bool>())
      throw Error(
          "merge",
          fmt::format("rows {} to {} of the merged weight hold values that are not finite in {}",
                      begin, end, c10::toString(dtype)));
    merged.narrow(0, begin, end - begin).copy_(rounded);
  }
  at::Tensor bias = bias_;
  for (const auto* one : folded) bias = one->merge_bias(bias);
  if (bias.defined() && !bias.isfinite().all().item<bool>())
    throw Error("merge", "the merged bias holds values that are not finite");

  const bool transposed = weight_.format == quant::Format::dense_transposed;
  auto weight = transposed ? quant::Weight::dense_transposed(merged.t().contiguous())
                           : quant::Weight::dense(std::move(merged));
  unmerged_.emplace(weight_, bias_);
  set_weight(std::move(weight), std::move(bias));
  merged_ = names;
}

void LinearSlotImpl::unmerge() {
  if (!unmerged_) return;
  auto [weight, bias] = std::move(*unmerged_);
  unmerged_.reset();
  merged_.clear();
  set_weight(std::move(weight), std::move(bias));
}

void LinearSlotImpl::replace_weight(quant::Weight weight) {
  if (!merged_.empty())
    throw Error("replace_weight", fmt::format("{} is merged: unmerge first", join(merged_)));
  if (weight.out != weight_.out || weight.in != weight_.in)
    throw Error("replace_weight", fmt::format("the slot's weight is [{}, {}], found [{}, {}]",
                                              weight_.out, weight_.in, weight.out, weight.in));
  set_weight(std::move(weight), bias_);
}

void LinearSlotImpl::forget_base() {
  unmerged_.reset();
  for (const auto& name : std::exchange(merged_, {}))
    if (adapter(name)) detach(name);
}

void LinearSlotImpl::set_weight(quant::Weight weight, at::Tensor bias) {
  auto& own = parameters_;
  for (size_t i = 0; i < weight_.parts.size(); ++i) own.erase(part_name(i));
  if (own.contains("bias")) own.erase("bias");
  for (size_t i = 0; i < weight.parts.size(); ++i)
    register_parameter(part_name(i), weight.parts[i], false);
  if (bias.defined()) register_parameter("bias", bias, false);
  weight_ = std::move(weight);
  bias_ = std::move(bias);
}

void LinearSlotImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  if (weight_.packed()) {
    torch::nn::Module::to(device, non_blocking);
    to(dtype, non_blocking);
  } else {
    torch::nn::Module::to(device, dtype, non_blocking);
  }
}

void LinearSlotImpl::to(torch::Dtype dtype, bool non_blocking) {
  if (!weight_.packed()) return torch::nn::Module::to(dtype, non_blocking);
  for (auto& child : children()) child->to(dtype, non_blocking);
  if (bias_.defined()) bias_.set_data(bias_.to(dtype, non_blocking));
}

EmbeddingSlotImpl::EmbeddingSlotImpl(quant::Weight weight) {
  for (size_t i = 0; i < weight.parts.size(); ++i)
    register_parameter(part_name(i), weight.parts[i], /*requires_grad=*/false);
  weight_ = std::move(weight);
}

void EmbeddingSlotImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  if (weight_.packed())
    torch::nn::Module::to(device, non_blocking);
  else
    torch::nn::Module::to(device, dtype, non_blocking);
}

void EmbeddingSlotImpl::to(torch::Dtype dtype, bool non_blocking) {
  if (!weight_.packed()) torch::nn::Module::to(dtype, non_blocking);
}

at::Tensor EmbeddingSlotImpl::forward(const at::Tensor& ids, at::ScalarType dtype) {
  if (ids.numel() > 0) {
    const auto [low, high] = at::aminmax(ids);
    const auto smallest = low.item<int64_t>(), largest = high.item<int64_t>();
    if (smallest < 0 || largest >= weight_.out)
      throw Error("embedding", fmt::format("token id {} is outside the vocabulary of {} tokens",
                                           smallest < 0 ? smallest : largest, weight_.out));
  }
  return weight_.gather(ids, dtype);
}

}  // namespace budwood
