#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/peft/fold.h>
#include <budwood/peft/slot.h>
#include <budwood/quant/error.h>
#include <budwood/quant/ops.h>

namespace budwood {
namespace {

std::string part_name(size_t i) {
  return i == 0 ? "weight" : fmt::format("weight_{}", i);
}

// A run-time weight moves a gain towards 1 and scales what is added.
LinearTerm weighted(LinearTerm term, double weight) {
  if (weight == 1.0) return term;
  term.scaling *= weight;
  if (term.gain.defined()) term.gain = 1 + weight * (term.gain - 1);
  term.magnitude = at::Tensor();
  if (term.input_gain.defined()) term.input_gain = 1 + weight * (term.input_gain - 1);
  return term;
}

}  // namespace

LinearSlotImpl::LinearSlotImpl(quant::Weight weight, at::Tensor bias) {
  set_weight(std::move(weight), std::move(bias));
}

std::vector<LinearTerm> LinearSlotImpl::terms() const {
  std::vector<LinearTerm> terms;
  for (const auto* adapter : running())
    terms.push_back(weighted(adapter->term(base_), adapter->weight()));
  return terms;
}

at::Tensor LinearSlotImpl::forward(const at::Tensor& x) {
  if (observer_) observer_(x);
  if (auto grouped = by_groups(x)) return *grouped;
  return apply_terms(base_, terms(), x);
}

std::optional<at::Tensor> LinearSlotImpl::by_groups(const at::Tensor& x) const {
  return by_groups(x.size(0), [&](const Adapter* adapter, const at::Tensor& rows) {
    std::vector<LinearTerm> own;
    if (adapter)
      own.push_back(
          weighted(static_cast<const LinearAdapter*>(adapter)->term(base_), adapter->weight()));
    return apply_terms(base_, own, x.index_select(0, rows));
  });
}

at::Tensor LinearSlotImpl::forward_with(const at::Tensor& x, std::vector<LinearTerm> first) const {
  for (auto& term : terms()) first.push_back(std::move(term));
  return apply_terms(base_, first, x);
}

std::optional<ops::Projection> LinearSlotImpl::projection(
    const std::vector<LinearTerm>& terms) const {
  if (observer_ || row_groups() || terms.size() > 1) return {};
  for (const auto& part : base_.weight.parts)
    if (part.requires_grad()) return {};
  ops::Projection projection{.weight = base_.weight, .bias = base_.bias};
  if (terms.empty()) return projection;
  const auto& term = terms[0];
  if (term.dropout > 0 || term.inner_bias.defined() || term.input_gain.defined() ||
      term.own_weight.defined() || term.scales.defined())
    return {};
  projection.a = term.a;
  projection.b = term.b;
  projection.scaling = term.scaling;
  projection.gain = term.gain;
  if (term.gain.defined() && !term.gain_spares_bias && base_.bias.defined())
    projection.bias = term.gain * base_.bias;
  return projection;
}

std::optional<quant::Weight> LinearSlotImpl::plain_weight() const {
  if (base_.bias.defined() || row_groups() || !running().empty()) return {};
  for (const auto& part : base_.weight.parts)
    if (part.requires_grad()) return {};
  return base_.weight;
}

std::vector<at::Tensor> forward_together(const ops::Source& source,
                                         const std::vector<LinearSlot>& slots) {
  std::vector<ops::Projection> projections;
  std::vector<std::vector<LinearTerm>> terms;
  for (const auto& slot : slots) {
    terms.push_back(slot->terms());
    auto projection = slot->projection(terms.back());
    if (!projection) break;
    projections.push_back(std::move(*projection));
  }
  if (projections.size() == slots.size()) return ops::project(source, projections);
  std::vector<at::Tensor> results;
  const auto x = source.value();
  for (const auto& slot : slots) results.push_back(slot.ptr()->forward(x));
  return results;
}

std::vector<LinearTerm> LinearSlotImpl::terms_to_merge(
    const std::vector<std::string>& names) const {
  std::vector<LinearTerm> terms;
  for (const auto& name : names) {
    const auto found = std::static_pointer_cast<LinearAdapter>(adapter(name));
    if (!found) continue;
    // Dropout and drawn ranks have no place in a weight.
    const bool training = found->is_training();
    found->eval();
    terms.push_back(weighted(found->term(base_), found->weight()));
    found->train(training);
  }
  return terms;
}

void LinearSlotImpl::merge(const std::vector<std::string>& names) {
  if (!merged_.empty())
    throw Error("merge",
                fmt::format("{} is merged already: unmerge first", fmt::join(merged_, ", ")));
  at::NoGradGuard no_grad;
  const auto folded = terms_to_merge(names);
  if (folded.empty()) return;
  auto weight = folded_weight(base_.weight, [&](at::Tensor rows, int64_t begin) {
    return fold_rows(std::move(rows), begin, folded);
  });
  const auto bias = fold_bias(base_.bias, folded);
  if (bias.defined() && !bias.isfinite().all().item<bool>())
    throw Error("merge", "the merged bias holds values that are not finite");
  unmerged_.emplace(base_);
  set_weight(std::move(weight), bias);
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
    throw Error("replace_weight",
                fmt::format("{} is merged: unmerge first", fmt::join(merged_, ", ")));
  if (weight.out != base_.weight.out || weight.in != base_.weight.in)
    throw Error("replace_weight",
                fmt::format("the slot's weight is [{}, {}], found [{}, {}]", base_.weight.out,
                            base_.weight.in, weight.out, weight.in));
  set_weight(std::move(weight), base_.bias);
}

void LinearSlotImpl::replace_bias(at::Tensor bias) {
  if (!merged_.empty())
    throw Error("replace_bias",
                fmt::format("{} is merged: unmerge first", fmt::join(merged_, ", ")));
  set_weight(base_.weight, std::move(bias));
}

void LinearSlotImpl::forget_base() {
  unmerged_.reset();
  for (const auto& name : std::exchange(merged_, {}))
    if (adapter(name)) detach(name);
}

void LinearSlotImpl::set_weight(quant::Weight weight, at::Tensor bias) {
  auto& own = parameters_;
  for (size_t i = 0; i < base_.weight.parts.size(); ++i) own.erase(part_name(i));
  if (own.contains("bias")) own.erase("bias");
  for (size_t i = 0; i < weight.parts.size(); ++i)
    register_parameter(part_name(i), weight.parts[i], /*requires_grad=*/false);
  if (bias.defined()) register_parameter("bias", bias, /*requires_grad=*/false);
  base_ = {std::move(weight), std::move(bias)};
}

void LinearSlotImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  if (base_.weight.packed()) {
    torch::nn::Module::to(device, non_blocking);
    to(dtype, non_blocking);
  } else {
    torch::nn::Module::to(device, dtype, non_blocking);
  }
}

void LinearSlotImpl::to(torch::Dtype dtype, bool non_blocking) {
  if (!base_.weight.packed()) return torch::nn::Module::to(dtype, non_blocking);
  for (auto& child : children()) child->to(dtype, non_blocking);
  if (base_.bias.defined()) base_.bias.set_data(base_.bias.to(dtype, non_blocking));
}

}  // namespace budwood
