#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/peft/fold.h>
#include <budwood/peft/slot.h>
#include <budwood/quant/error.h>

namespace budwood {
namespace {

std::string part_name(size_t i) {
  return i == 0 ? "weight" : fmt::format("weight_{}", i);
}

// What an adapter at its run-time weight makes of rows: all of a change, or a part of it.
at::Tensor weighted(const Adapter& adapter, const at::Tensor& before, at::Tensor after) {
  if (adapter.weight() == 1.0) return after;
  return before + adapter.weight() * (after - before);
}

}  // namespace

EmbeddingSlotImpl::EmbeddingSlotImpl(quant::Weight weight) {
  set_weight(std::move(weight));
}

void EmbeddingSlotImpl::set_weight(quant::Weight weight) {
  for (size_t i = 0; i < weight_.parts.size(); ++i) parameters_.erase(part_name(i));
  for (size_t i = 0; i < weight.parts.size(); ++i)
    register_parameter(part_name(i), weight.parts[i], /*requires_grad=*/false);
  weight_ = std::move(weight);
}

at::Tensor EmbeddingSlotImpl::forward(const at::Tensor& ids, at::ScalarType dtype) {
  if (ids.numel() > 0) {
    const auto [low, high] = at::aminmax(ids);
    const auto smallest = low.item<int64_t>(), largest = high.item<int64_t>();
    if (smallest < 0 || largest >= weight_.out)
      throw Error("embedding", fmt::format("token id {} is outside the vocabulary of {} tokens",
                                           smallest < 0 ? smallest : largest, weight_.out));
  }
  if (weight_.parts[0].requires_grad())
    return adapt(ids, at::embedding(weight_.parts[0], ids).to(dtype));
  return adapt(ids, weight_.gather(ids, dtype));
}

at::Tensor EmbeddingSlotImpl::adapt(const at::Tensor& ids, at::Tensor rows) const {
  const auto dtype = rows.scalar_type();
  const auto grouped = by_groups(ids.size(0), [&](const Adapter* adapter, const at::Tensor& own) {
    const auto table_rows = rows.index_select(0, own);
    if (!adapter) return table_rows;
    const auto& chosen = static_cast<const EmbeddingAdapter&>(*adapter);
    return weighted(chosen, table_rows,
                    chosen.forward(weight_, ids.index_select(0, own), table_rows))
        .to(dtype);
  });
  if (grouped) return *grouped;
  for (const auto* adapter : running_as<EmbeddingAdapter>())
    rows = weighted(*adapter, rows, adapter->forward(weight_, ids, rows));
  return rows.to(dtype);
}

void EmbeddingSlotImpl::merge(const std::vector<std::string>& names) {
  if (!merged_.empty())
    throw Error("merge",
                fmt::format("{} is merged already: unmerge first", fmt::join(merged_, ", ")));
  at::NoGradGuard no_grad;
  std::vector<std::shared_ptr<EmbeddingAdapter>> folded;
  for (const auto& name : names)
    if (auto found = std::static_pointer_cast<EmbeddingAdapter>(adapter(name)))
      folded.push_back(std::move(found));
  if (folded.empty()) return;
  auto weight = folded_weight(weight_, [&](at::Tensor rows, int64_t begin) {
    for (const auto& adapter : folded)
      rows = weighted(*adapter, rows, adapter->fold_rows(weight_, rows.clone(), begin));
    return rows;
  });
  unmerged_ = weight_;
  set_weight(std::move(weight));
  merged_ = names;
}

void EmbeddingSlotImpl::unmerge() {
  if (!unmerged_) return;
  auto weight = std::move(*unmerged_);
  unmerged_.reset();
  merged_.clear();
  set_weight(std::move(weight));
}

void EmbeddingSlotImpl::forget_base() {
  unmerged_.reset();
  for (const auto& name : std::exchange(merged_, {}))
    if (adapter(name)) detach(name);
}

void EmbeddingSlotImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  if (weight_.packed()) {
    torch::nn::Module::to(device, non_blocking);
    to(dtype, non_blocking);
  } else {
    torch::nn::Module::to(device, dtype, non_blocking);
  }
}

void EmbeddingSlotImpl::to(torch::Dtype dtype, bool non_blocking) {
  if (!weight_.packed()) return torch::nn::Module::to(dtype, non_blocking);
  for (auto& child : children()) child->to(dtype, non_blocking);
}

}  // namespace budwood
