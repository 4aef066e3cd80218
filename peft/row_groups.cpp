#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/config.h>
#include <budwood/peft/row_groups.h>
#include <budwood/peft/slot.h>
#include <budwood/quant/error.h>
#include <algorithm>

namespace budwood {
namespace {

void set_groups(torch::nn::Module& model, const std::shared_ptr<const RowGroups>& groups) {
  for (const auto& module : model.modules(/*include_self=*/false))
    if (auto* slot = dynamic_cast<Slot*>(module.get())) slot->set_row_groups(groups);
}

void require_rows(torch::nn::Module& model, const std::string& name) {
  bool found = false;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    const auto* slot = dynamic_cast<Slot*>(item.value().get());
    const auto adapter = slot ? slot->adapter(name) : nullptr;
    if (!adapter) continue;
    found = true;
    if (slot->kind() != SlotKind::linear && slot->kind() != SlotKind::embedding)
      throw Error("use_adapters",
                  fmt::format("'{}' is {} and attaches to {}, a slot of kind {}: only adapters of "
                              "projections and token tables can differ by row",
                              name, adapter->config()->peft_type, item.key(),
                              slot_kind_name(slot->kind())));
  }
  if (!found) throw Error("use_adapters", fmt::format("no adapter named '{}'", name));
}

}  // namespace

RowGroups row_groups(const std::vector<int64_t>& cu, const std::vector<std::string>& names) {
  if (names.size() + 1 != cu.size())
    throw Error("use_adapters", fmt::format("{} adapter names for {} sequences", names.size(),
                                            cu.empty() ? 0 : cu.size() - 1));
  std::vector<std::pair<std::string, std::vector<int64_t>>> rows;
  for (size_t s = 0; s < names.size(); ++s) {
    auto it = std::find_if(rows.begin(), rows.end(),
                           [&](const auto& group) { return group.first == names[s]; });
    if (it == rows.end()) it = rows.insert(it, {names[s], {}});
    for (int64_t i = cu[s]; i < cu[s + 1]; ++i) it->second.push_back(i);
  }
  RowGroups groups;
  for (const auto& [name, own] : rows) groups.push_back({name, at::tensor(own, at::kLong)});
  return groups;
}

UseAdapters::UseAdapters(torch::nn::Module& model, RowGroups groups) : model_(model) {
  for (const auto& module : model.modules(/*include_self=*/false))
    if (const auto* slot = dynamic_cast<const Slot*>(module.get()); slot && !slot->merged().empty())
      throw Error("use_adapters",
                  fmt::format("'{}' is merged into the base: unmerge it first", slot->merged()[0]));
  for (const auto& group : groups)
    if (!group.adapter.empty()) require_rows(model, group.adapter);
  set_groups(model, std::make_shared<const RowGroups>(std::move(groups)));
}

UseAdapters::~UseAdapters() {
  set_groups(model_, nullptr);
}

}  // namespace budwood
