#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/peft/slot.h>
#include <budwood/quant/error.h>
#include <algorithm>

namespace budwood {

const char* slot_kind_name(SlotKind kind) {
  switch (kind) {
    case SlotKind::linear:
      return "Linear";
    case SlotKind::embedding:
      return "Embedding";
    case SlotKind::input:
      return "Input";
    case SlotKind::attention:
      return "Attention";
    case SlotKind::block:
      return "Block";
  }
  return "?";
}

Composition composition_of(const std::string& name) {
  if (name == "stack") return Composition::stack;
  if (name == "parallel") return Composition::parallel;
  throw Error("set_active", fmt::format("composition is 'stack' or 'parallel', found '{}'", name));
}

std::vector<at::Tensor> Adapter::trained() const {
  return parameters();
}

const std::vector<std::string>& Slot::merged() const {
  static const std::vector<std::string> none;
  return none;
}

void Slot::attach(const std::string& name, std::shared_ptr<Adapter> adapter) {
  const auto listed = [](const std::vector<std::string>& names) {
    return names.empty() ? std::string("none") : fmt::format("{}", fmt::join(names, ", "));
  };
  if (this->adapter(name))
    throw Error("attach", fmt::format("an adapter named '{}' is attached already; attached: {}",
                                      name, listed(adapter_names())));
  if (adapter->kind() != kind())
    throw Error("attach", fmt::format("'{}' is for {} slots, and this is one of kind {}", name,
                                      slot_kind_name(adapter->kind()), slot_kind_name(kind())));
  if (!merged().empty())
    throw Error("attach", fmt::format("'{}' cannot be attached while {} is merged: unmerge first",
                                      name, listed(merged())));
  auto active = active_;
  active.push_back(name);
  register_module("adapter_" + name, adapter);
  adapters_.push_back({name, std::move(adapter)});
  active_ = std::move(active);
}

void Slot::detach(const std::string& name) {
  const auto it = std::find_if(adapters_.begin(), adapters_.end(),
                               [&](const Entry& entry) { return entry.name == name; });
  if (it == adapters_.end())
    throw Error("detach", fmt::format("no adapter named '{}'; attached: {}", name,
                                      fmt::join(adapter_names(), ", ")));
  if (std::find(merged().begin(), merged().end(), name) != merged().end())
    throw Error("detach", fmt::format("'{}' is merged into the weight: unmerge first", name));
  unregister_module("adapter_" + name);
  adapters_.erase(it);
  std::erase(active_, name);
}

std::optional<at::Tensor> Slot::by_groups(
    int64_t rows,
    const std::function<at::Tensor(const Adapter*, const at::Tensor&)>& compute) const {
  if (!row_groups_ || !enabled_ || !merged().empty()) return {};
  const bool any = std::any_of(row_groups_->begin(), row_groups_->end(),
                               [&](const RowGroup& group) { return adapter(group.adapter); });
  if (!any) return {};
  std::vector<at::Tensor> order, results;
  for (const auto& group : *row_groups_) {
    order.push_back(group.rows);
    results.push_back(compute(adapter(group.adapter).get(), group.rows));
  }
  const auto places = at::cat(order);
  if (places.size(0) != rows)
    throw Error("use_adapters",
                fmt::format("the groups have {} rows, and a slot reads {}", places.size(0), rows));
  return at::cat(results).index_select(0, places.argsort());
}

std::shared_ptr<Adapter> Slot::adapter(const std::string& name) const {
  for (const auto& entry : adapters_)
    if (entry.name == name) return entry.adapter;
  return nullptr;
}

std::vector<std::string> Slot::adapter_names() const {
  std::vector<std::string> names;
  for (const auto& entry : adapters_) names.push_back(entry.name);
  return names;
}

void Slot::require_composable(const std::vector<std::string>& names) const {
  if (names.size() < 2) return;
  for (const auto& name : names)
    if (!adapter(name)->composes())
      throw Error("set_active", fmt::format("'{}' cannot be active beside another adapter at the "
                                            "same place; asked for were {}",
                                            name, fmt::join(names, ", ")));
}

void Slot::set_active(const std::vector<std::string>& names) {
  std::vector<std::string> here;
  for (const auto& name : names)
    if (adapter(name)) here.push_back(name);
  require_composable(here);
  active_ = std::move(here);
}

int64_t InputSlotImpl::virtual_tokens() const {
  int64_t count = 0;
  for (const auto* adapter : running_as<InputAdapter>())
    for (const auto& group : adapter->placement().groups) count += group.count;
  return count;
}

bool InputSlotImpl::among_embeddings() const {
  int64_t count = 0, all = 0;
  for (const auto* adapter : running_as<InputAdapter>()) {
    count += adapter->among_embeddings();
    ++all;
  }
  if (count != 0 && count != all)
    throw Error("forward", "some virtual tokens go among words and some among embeddings");
  return count > 0;
}

std::optional<Inserted> InputSlotImpl::insert(const Sequences& sequences) const {
  std::vector<const Placement*> placements;
  for (const auto* adapter : running_as<InputAdapter>())
    placements.push_back(&adapter->placement());
  if (placements.empty()) return {};
  return insert_virtual_tokens(placements, sequences.cu, sequences.prompt);
}

at::Tensor InputSlotImpl::forward(const at::Tensor& embedded,
                                  const std::vector<int64_t>& rows) const {
  std::vector<at::Tensor> all{embedded};
  for (const auto* adapter : running_as<InputAdapter>()) {
    auto tokens = adapter->tokens();
    if (adapter->weight() != 1.0) tokens = tokens * adapter->weight();
    all.push_back(tokens.to(embedded.scalar_type()));
  }
  std::vector<int64_t> from(rows.size());
  for (size_t i = 0; i < rows.size(); ++i)
    from[i] = rows[i] < 0 ? embedded.size(0) - 1 - rows[i] : static_cast<int64_t>(i);
  const auto index = at::tensor(from, at::TensorOptions().dtype(at::kLong)).to(embedded.device());
  return at::cat(all).index_select(0, index);
}

KeyValues AttentionSlotImpl::prefix() const {
  std::vector<at::Tensor> k, v;
  for (const auto* adapter : running_as<AttentionAdapter>()) {
    auto one = adapter->prefix();
    if (!one.k.defined()) continue;
    k.push_back(one.k);
    v.push_back(adapter->weight() == 1.0 ? one.v : one.v * adapter->weight());
  }
  if (k.empty()) return {};
  if (k.size() == 1) return {k[0], v[0]};
  return {at::cat(k), at::cat(v)};
}

KeyValues AttentionSlotImpl::prefix(const at::Tensor& hidden, const Sequences& sequences) const {
  const auto count = static_cast<int64_t>(sequences.cu.size()) - 1;
  std::vector<at::Tensor> k, v;
  for (const auto* adapter : running_as<AttentionAdapter>()) {
    const auto one = adapter->prefix();
    if (!one.k.defined()) continue;
    auto factors = at::ones({count, 2}, one.k.options());
    if (adapter->gates_prefix()) factors = adapter->gate(hidden, sequences).to(one.k.scalar_type());
    const auto times = [&](const at::Tensor& rows, int64_t column, double weight) {
      return rows.unsqueeze(0) * (factors.select(1, column) * weight).view({count, 1, 1, 1});
    };
    k.push_back(times(one.k, 0, 1.0));
    v.push_back(times(one.v, 1, adapter->weight()));
  }
  if (k.empty()) return {};
  return {at::cat(k, 1), at::cat(v, 1)};
}

bool AttentionSlotImpl::gates_prefix() const {
  const auto running = running_as<AttentionAdapter>();
  return std::any_of(running.begin(), running.end(),
                     [](const auto* adapter) { return adapter->gates_prefix(); });
}

int64_t AttentionSlotImpl::position_shift() const {
  int64_t shift = 0;
  for (const auto* adapter : running_as<AttentionAdapter>()) {
    const auto one = adapter->moves_positions() ? adapter->prefix() : KeyValues{};
    if (one.k.defined()) shift += one.k.size(0);
  }
  return shift;
}

at::Tensor AttentionSlotImpl::beside(at::Tensor attended,
                                     const AttentionAdapter::Around& around) const {
  const auto dtype = attended.scalar_type();
  for (const auto* adapter : running_as<AttentionAdapter>()) {
    const auto added = adapter->beside(around);
    if (!added.defined()) continue;
    attended = attended + (adapter->weight() == 1.0 ? added : added * adapter->weight());
  }
  return attended.to(dtype);
}

at::Tensor with_prefix(const at::Tensor& prefix, const at::Tensor& rows,
                       const std::vector<int64_t>& cu) {
  const bool own = prefix.dim() > rows.dim();  // each sequence has its own
  const int64_t t = prefix.size(own ? 1 : 0);
  const auto count = static_cast<int64_t>(cu.size()) - 1;
  const int64_t prefixed = own ? count * t : t;
  std::vector<int64_t> order;
  order.reserve(static_cast<size_t>(rows.size(0)) + (cu.size() - 1) * static_cast<size_t>(t));
  for (size_t s = 0; s + 1 < cu.size(); ++s) {
    const int64_t first = own ? static_cast<int64_t>(s) * t : 0;
    for (int64_t i = 0; i < t; ++i) order.push_back(first + i);
    for (int64_t i = cu[s]; i < cu[s + 1]; ++i) order.push_back(prefixed + i);
  }
  const auto given = prefix.to(rows.scalar_type());
  const auto index = at::tensor(order, at::TensorOptions().dtype(at::kLong)).to(rows.device());
  return at::cat({own ? given.flatten(0, 1) : given, rows}).index_select(0, index);
}

namespace {

// `h` changed by adapters whose one does apply(adapter, input).
at::Tensor composed(
    const std::vector<const BlockAdapter*>& adapters, Composition composition, at::Tensor h,
    const std::function<at::Tensor(const BlockAdapter&, const at::Tensor&)>& apply) {
  const auto dtype = h.scalar_type();
  const auto first = h;
  for (const auto* adapter : adapters) {
    const auto& input = composition == Composition::stack ? h : first;
    const auto changed = apply(*adapter, input);
    if (adapters.size() == 1 && adapter->weight() == 1.0) return changed.to(dtype);
    const bool plain = composition == Composition::stack && adapter->weight() == 1.0;
    h = plain ? changed : h + adapter->weight() * (changed - input);
  }
  return h.to(dtype);
}

}  // namespace

at::Tensor BlockSlotImpl::adapt(at::Tensor h, const at::Tensor& x, const BlockAdapter::Norm& norm,
                                const Sequences& sequences) const {
  return composed(running_as<BlockAdapter>(), composition(), std::move(h),
                  [&](const BlockAdapter& adapter, const at::Tensor& input) {
                    return adapter.forward(input, x, norm, sequences);
                  });
}

at::Tensor BlockSlotImpl::edit(at::Tensor stream, const Sequences& sequences) const {
  return composed(running_as<BlockAdapter>(), composition(), std::move(stream),
                  [&](const BlockAdapter& adapter, const at::Tensor& input) {
                    return adapter.edit(input, sequences);
                  });
}

at::Tensor BlockSlotImpl::forward(at::Tensor h, const at::Tensor& x, const BlockAdapter::Norm& norm,
                                  const Sequences& sequences) const {
  auto stream = x + adapt(std::move(h), x, norm, sequences);
  if (norm) stream = norm(stream);
  return edit(std::move(stream), sequences);
}

}  // namespace budwood
