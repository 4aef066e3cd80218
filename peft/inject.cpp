#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/peft/companions.h>
#include <budwood/peft/described.h>
#include <budwood/peft/inject.h>
#include <budwood/peft/inject_matched.h>
#include <budwood/peft/method.h>
#include <budwood/peft/slot.h>
#include <budwood/peft/targets.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <cmath>
#include <map>
#include <set>

namespace budwood {
namespace {

struct NamedSlot {
  std::string path;
  Slot* slot;
};

std::vector<NamedSlot> slots_of(torch::nn::Module& model) {
  std::vector<NamedSlot> slots;
  for (const auto& item : model.named_modules("", /*include_self=*/false))
    if (auto* slot = dynamic_cast<Slot*>(item.value().get())) slots.push_back({item.key(), slot});
  return slots;
}

// Everything a target pattern can be matched against, in the model's order.
std::vector<ModuleInfo> module_list(torch::nn::Module& model) {
  std::vector<ModuleInfo> modules;
  const auto* described = dynamic_cast<Described*>(&model);
  const auto head = described ? described->output_embedding() : std::string();
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    if (dynamic_cast<Adapter*>(item.value().get())) continue;
    ModuleInfo info{item.key(), ModuleKind::other, false};
    const auto* any = dynamic_cast<Slot*>(item.value().get());
    if (any && any->kind() != SlotKind::linear && any->kind() != SlotKind::embedding) continue;
    if (const auto* slot = dynamic_cast<LinearSlotImpl*>(item.value().get()))
      info.kind = slot->weight().format == quant::Format::dense_transposed ? ModuleKind::conv1d
                                                                           : ModuleKind::linear;
    else if (dynamic_cast<EmbeddingSlotImpl*>(item.value().get()))
      info.kind = ModuleKind::embedding;
    info.is_output_embedding = !head.empty() && item.key() == head;
    modules.push_back(std::move(info));
  }
  return modules;
}

std::string model_type(torch::nn::Module& model) {
  const auto* described = dynamic_cast<Described*>(&model);
  return described ? described->model_type() : "";
}

// The stream of a place depends on its path alone, so adding a target moves no other's values.
uint64_t place_seed(uint64_t seed, const std::string& path) {
  uint64_t hash = 14695981039346656037ull ^ seed;
  for (const unsigned char c : path) hash = (hash ^ c) * 1099511628211ull;
  return hash;
}

std::string known_adapters(torch::nn::Module& model) {
  std::vector<std::string> names;
  for (const auto& [path, slot] : slots_of(model))
    for (const auto& name : slot->adapter_names())
      if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  return names.empty() ? "none" : fmt::format("{}", fmt::join(names, ", "));
}

Adapters adapters_of(torch::nn::Module& model, const std::string& name) {
  Adapters found;
  for (const auto& [path, slot] : slots_of(model))
    if (auto adapter = slot->adapter(name)) found.push_back(std::move(adapter));
  return found;
}

void require_known(torch::nn::Module& model, const std::string& name, const char* where) {
  if (adapters_of(model, name).empty())
    throw Error(where,
                fmt::format("no adapter named '{}'; attached: {}", name, known_adapters(model)));
}

void train_biases(torch::nn::Module& model, const std::string& bias, const std::string& name) {
  if (bias == "none") return;
  for (auto& item : model.named_parameters()) {
    const auto& path = item.key();
    if (bias == "all" && (path == "bias" || path.ends_with(".bias")))
      item.value().set_requires_grad(true);
  }
  if (bias == "lora_only")
    for (const auto& [path, slot] : slots_of(model))
      if (auto* linear = dynamic_cast<LinearSlotImpl*>(slot))
        if (linear->adapter(name) && linear->bias().defined()) {
          auto own = linear->bias();
          own.set_requires_grad(true);
        }
}

// The adapters of each active name, in the order of the model.
std::vector<Adapters> active_adapters(torch::nn::Module& model) {
  std::vector<std::string> names;
  for (const auto& [path, slot] : slots_of(model))
    for (const auto& name : slot->active())
      if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  std::vector<Adapters> all;
  for (const auto& name : names) {
    auto own = adapters_of(model, name);
    std::erase_if(own, [](const auto& adapter) { return adapter->companion(); });
    if (!own.empty()) all.push_back(std::move(own));
  }
  return all;
}

Place place_of(const NamedSlot& named, uint64_t seed) {
  Place place{.path = named.path, .kind = named.slot->kind(), .seed = place_seed(seed, named.path)};
  if (const auto* linear = dynamic_cast<LinearSlotImpl*>(named.slot)) {
    place.base = linear->base();
  } else if (const auto* table = dynamic_cast<EmbeddingSlotImpl*>(named.slot)) {
    place.base.weight = table->weight();
  } else if (const auto* input = dynamic_cast<InputSlotImpl*>(named.slot)) {
    place.hidden = input->hidden();
  } else if (const auto* attention = dynamic_cast<AttentionSlotImpl*>(named.slot)) {
    place.layer = attention->layer();
    place.hidden = attention->hidden();
    place.heads = attention->heads();
    place.kv_heads = attention->kv_heads();
    place.head_dim = attention->head_dim();
  } else if (const auto* block = dynamic_cast<BlockSlotImpl*>(named.slot)) {
    place.layer = block->layer();
    place.hidden = block->hidden();
    place.part = block->part();
  }
  return place;
}

void add_companions(std::vector<Grafted>& made, const std::shared_ptr<const AdapterConfig>& config,
                    const std::vector<Place>& places, torch::nn::Module& model,
                    Strictness strictness, std::vector<std::string>& warnings) {
  std::vector<std::string> modules;
  for (const auto& item : model.named_modules("", /*include_self=*/false))
    modules.push_back(item.key());
  std::set<size_t> taken;
  for (const auto& grafted : made) taken.insert(grafted.place);
  for (auto& grafted : make_companions(config, places, modules, strictness, warnings)) {
    if (!taken.insert(grafted.place).second)
      throw Error("inject", fmt::format("'{}' is adapted by {} and cannot be trained whole or by "
                                        "rows along with that",
                                        places[grafted.place].path, config->peft_type));
    made.push_back(std::move(grafted));
  }
}

// Numbers of the model, whatever holds them: a packed matrix counts as the matrix that it stands
// for, and a shared tensor once.
void count(torch::nn::Module& model, InjectReport& report) {
  std::set<const void*> seen;
  report.total = report.trainable = 0;
  const auto count_packed = [&](const quant::Weight& w) {
    if (!w.packed()) return;
    if (!seen.contains(w.parts[0].unsafeGetTensorImpl())) report.total += w.out * w.in;
    for (const auto& part : w.parts) seen.insert(part.unsafeGetTensorImpl());
  };
  const auto look_into = [&](const torch::nn::Module& module) {
    if (const auto* slot = dynamic_cast<const LinearSlotImpl*>(&module))
      count_packed(slot->weight());
    if (const auto* table = dynamic_cast<const EmbeddingSlotImpl*>(&module))
      count_packed(table->weight());
  };
  // Without itself: the model may live on the stack.
  look_into(model);
  for (const auto& module : model.modules(/*include_self=*/false)) look_into(*module);
  for (const auto& p : model.parameters()) {
    if (!seen.insert(p.unsafeGetTensorImpl()).second) continue;
    report.total += p.numel();
    if (p.requires_grad()) report.trainable += p.numel();
  }
}

}  // namespace

InjectReport inject_matched(torch::nn::Module& model, std::shared_ptr<const AdapterConfig> given,
                            const std::string& name, uint64_t seed, Strictness strictness) {
  const auto& method = method_of(given->peft_type);
  given->validate(strictness);
  InjectReport report;
  const auto config = given->clone();
  std::optional<std::set<std::string>> targets;
  if (given->target_rules()) {
    const auto found = match_targets(*given, module_list(model), model_type(model), strictness);
    config->resolve(found.target_modules, found.matched, model_type(model));
    targets.emplace(found.matched.begin(), found.matched.end());
    report.warnings = found.warnings;
  }
  std::vector<Slot*> slots;
  std::vector<Place> places, targeted;
  std::vector<size_t> index;  // of the targeted ones among all
  for (const auto& named : slots_of(model)) {
    if (named.slot->adapter(name))
      throw Error("inject", fmt::format("an adapter named '{}' is attached already", name));
    slots.push_back(named.slot);
    places.push_back(place_of(named, seed));
    if (targets && !targets->contains(named.path)) continue;
    index.push_back(places.size() - 1);
    targeted.push_back(places.back());
  }

  // All adapters are made before the first is attached: a failure leaves the model as it was.
  auto made = method.make(config, targeted, seed);
  if (made.empty())
    throw Error("inject",
                fmt::format("{} found no place in this model to attach to", config->peft_type));
  for (auto& grafted : made) grafted.place = index[grafted.place];
  add_companions(made, config, places, model, strictness, report.warnings);
  for (const auto& [index, adapter] : made) {
    const auto& place = places[index];
    int64_t parameters = 0;
    for (const auto& p : adapter->trained()) parameters += p.numel();
    report.places.push_back({place.path, slot_kind_name(place.kind), place.base.weight.out,
                             place.base.weight.in, adapter->rank(), parameters});
  }
  for (auto& p : model.parameters()) p.set_requires_grad(false);
  for (const auto& [index, adapter] : made) slots[index]->attach(name, adapter);
  try {
    set_active(model, {name});
  } catch (...) {
    for (const auto& [index, adapter] : made) slots[index]->detach(name);
    throw;
  }
  count(model, report);
  return report;
}

InjectReport inject(torch::nn::Module& model, std::shared_ptr<const AdapterConfig> config,
                    const std::string& name, uint64_t seed) {
  return inject_matched(model, std::move(config), name, seed, Strictness::strict);
}

void detach(torch::nn::Module& model, const std::string& name) {
  require_known(model, name, "detach");
  for (const auto& [path, slot] : slots_of(model))
    if (slot->adapter(name)) slot->detach(name);
}

void set_active(torch::nn::Module& model, const std::vector<std::string>& names,
                Composition composition) {
  for (const auto& name : names) require_known(model, name, "set_active");
  for (auto& p : model.parameters()) p.set_requires_grad(false);
  for (const auto& [path, slot] : slots_of(model)) {
    slot->set_active(names);
    slot->set_composition(composition);
  }
  for (const auto& name : names) {
    for (const auto& adapter : adapters_of(model, name)) {
      for (auto& p : adapter->trained()) p.set_requires_grad(true);
      train_biases(model, adapter->trained_bias(), name);
    }
  }
}

void set_weight(torch::nn::Module& model, const std::string& name, double weight) {
  require_known(model, name, "set_weight");
  if (!std::isfinite(weight))
    throw Error("set_weight", fmt::format("the weight of '{}' is {}", name, weight));
  const auto slots = slots_of(model);
  for (const auto& [path, slot] : slots) {
    const auto& merged = slot->merged();
    if (std::find(merged.begin(), merged.end(), name) != merged.end())
      throw Error("set_weight", fmt::format("'{}' is merged: unmerge first", name));
  }
  for (const auto& adapter : adapters_of(model, name))
    if (!adapter->companion()) adapter->set_weight(weight);
}

void merge(torch::nn::Module& model, const std::vector<std::string>& names) {
  for (const auto& name : names) require_known(model, name, "merge");
  const auto slots = slots_of(model);
  for (const auto& [path, slot] : slots) {
    if (!slot->merged().empty())
      throw Error("merge", fmt::format("{} is merged already: unmerge first",
                                       fmt::join(slot->merged(), ", ")));
    if (slot->kind() == SlotKind::linear || slot->kind() == SlotKind::embedding) continue;
    for (const auto& name : names)
      if (const auto adapter = slot->adapter(name))
        throw Error("merge",
                    fmt::format("'{}' is {} and cannot be merged: what it does at {} is no "
                                "change of a weight",
                                name, adapter->config()->peft_type, path));
  }
  for (const auto& [path, slot] : slots) {
    try {
      if (auto* linear = dynamic_cast<LinearSlotImpl*>(slot)) linear->merge(names);
      if (auto* table = dynamic_cast<EmbeddingSlotImpl*>(slot)) table->merge(names);
    } catch (const std::exception& e) {
      unmerge(model);
      throw Error("merge", fmt::format("{}: {}", path, e.what()));
    }
  }
}

void unmerge(torch::nn::Module& model) {
  for (const auto& [path, slot] : slots_of(model)) {
    if (auto* linear = dynamic_cast<LinearSlotImpl*>(slot)) linear->unmerge();
    if (auto* table = dynamic_cast<EmbeddingSlotImpl*>(slot)) table->unmerge();
  }
}

void set_adapters_enabled(torch::nn::Module& model, bool enabled) {
  for (const auto& [path, slot] : slots_of(model)) slot->set_adapters_enabled(enabled);
}

at::Tensor penalty(torch::nn::Module& model) {
  at::Tensor sum;
  for (const auto& adapters : active_adapters(model)) {
    const auto& method = method_of(adapters[0]->config()->peft_type);
    if (!method.penalty) continue;
    const auto own = method.penalty(adapters);
    if (own.defined()) sum = sum.defined() ? sum + own : own;
  }
  return sum;
}

void before_step(torch::nn::Module& model, int64_t step) {
  for (const auto& adapters : active_adapters(model)) {
    const auto& method = method_of(adapters[0]->config()->peft_type);
    if (method.before_step) method.before_step(adapters, step);
  }
}

void after_step(torch::nn::Module& model, int64_t step) {
  for (const auto& adapters : active_adapters(model)) {
    const auto& method = method_of(adapters[0]->config()->peft_type);
    if (method.after_step) method.after_step(adapters, step);
  }
}

DisableAdapters::DisableAdapters(torch::nn::Module& model) : model_(model) {
  set_adapters_enabled(model_, false);
}

DisableAdapters::~DisableAdapters() {
  set_adapters_enabled(model_, true);
}

std::vector<std::pair<std::string, at::Tensor>> trainable_parameters(torch::nn::Module& model) {
  std::vector<std::pair<std::string, at::Tensor>> trained;
  std::set<const void*> seen;
  for (const auto& item : model.named_parameters())
    if (item.value().requires_grad() && seen.insert(item.value().unsafeGetTensorImpl()).second)
      trained.emplace_back(item.key(), item.value());
  return trained;
}

std::string InjectReport::summary() const {
  // Places that differ only in a layer number are one line.
  std::map<std::string, std::pair<Injected, int64_t>> groups;
  std::vector<std::string> order;
  for (const auto& place : places) {
    const auto leaf = place.path.substr(place.path.rfind('.') + 1);
    const auto key =
        fmt::format("{} {} {} {} {}", leaf, place.out, place.in, place.rank, place.parameters);
    const auto [it, fresh] = groups.try_emplace(key, place, 0);
    if (fresh) {
      it->second.first.path = leaf;
      order.push_back(key);
    }
    ++it->second.second;
  }
  std::string text;
  for (const auto& key : order) {
    const auto& [place, times] = groups.at(key);
    const auto shape = place.out > 0 ? fmt::format("[{}, {}]", place.out, place.in) : place.kind;
    const auto rank = place.rank > 0 ? fmt::format("rank {}", place.rank) : "";
    text += fmt::format("  {:<18} {:>4} x {:<14} {:<9} {:>10} parameters\n", place.path, times,
                        shape, rank, place.parameters * times);
  }
  text += fmt::format(
      "  {} of {} parameters are trained ({:.2f} %)", trainable, total,
      total ? 100.0 * static_cast<double>(trainable) / static_cast<double>(total) : 0.0);
  return text;
}

}  // namespace budwood
