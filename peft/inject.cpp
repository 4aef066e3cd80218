#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/peft/inject.h>
#include <budwood/peft/inject_matched.h>
#include <budwood/peft/method.h>
#include <budwood/peft/models/model.h>
#include <budwood/peft/slot.h>
#include <budwood/peft/targets.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <map>
#include <set>

namespace budwood {
namespace {

struct NamedSlot {
  std::string path;
  LinearSlotImpl* slot;
};

std::vector<NamedSlot> linear_slots(torch::nn::Module& model) {
  std::vector<NamedSlot> slots;
  for (const auto& item : model.named_modules("", /*include_self=*/false))
    if (auto* slot = dynamic_cast<LinearSlotImpl*>(item.value().get()))
      slots.push_back({item.key(), slot});
  return slots;
}

// Everything a target pattern can be matched against, in the model's order.
std::vector<ModuleInfo> module_list(torch::nn::Module& model) {
  std::vector<ModuleInfo> modules;
  const bool has_head = dynamic_cast<models::CausalLM*>(&model) != nullptr;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    if (dynamic_cast<Adapter*>(item.value().get())) continue;
    ModuleInfo info{item.key(), ModuleKind::other, false};
    if (const auto* slot = dynamic_cast<LinearSlotImpl*>(item.value().get()))
      info.kind = slot->weight().format == quant::Format::dense_transposed ? ModuleKind::conv1d
                                                                           : ModuleKind::linear;
    else if (dynamic_cast<EmbeddingSlotImpl*>(item.value().get()))
      info.kind = ModuleKind::embedding;
    info.is_output_embedding = has_head && item.key() == "lm_head";
    modules.push_back(std::move(info));
  }
  return modules;
}

std::string model_type(torch::nn::Module& model) {
  const auto* lm = dynamic_cast<models::CausalLM*>(&model);
  return lm ? lm->config().model_type : "";
}

// The stream of a place depends on its path alone, so adding a target moves no other's values.
uint64_t place_seed(uint64_t seed, const std::string& path) {
  uint64_t hash = 14695981039346656037ull ^ seed;
  for (const unsigned char c : path) hash = (hash ^ c) * 1099511628211ull;
  return hash;
}

std::string known_adapters(torch::nn::Module& model) {
  std::vector<std::string> names;
  for (const auto& [path, slot] : linear_slots(model))
    for (const auto& name : slot->adapter_names())
      if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  return names.empty() ? "none" : fmt::format("{}", fmt::join(names, ", "));
}

void require_known(torch::nn::Module& model, const std::string& name, const char* where) {
  for (const auto& [path, slot] : linear_slots(model))
    if (slot->adapter(name)) return;
  throw Error(where,
              fmt::format("no adapter named '{}'; attached: {}", name, known_adapters(model)));
}

std::shared_ptr<LinearAdapter> first_adapter(torch::nn::Module& model, const std::string& name) {
  for (const auto& [path, slot] : linear_slots(model))
    if (auto found = slot->adapter(name)) return found;
  return nullptr;
}

void train_biases(torch::nn::Module& model, const std::string& bias, const std::string& name) {
  if (bias == "none") return;
  for (auto& item : model.named_parameters()) {
    const auto& path = item.key();
    if (bias == "all" && (path == "bias" || path.ends_with(".bias")))
      item.value().set_requires_grad(true);
  }
  if (bias == "lora_only")
    for (const auto& [path, slot] : linear_slots(model))
      if (slot->adapter(name) && slot->bias().defined()) slot->bias().set_requires_grad(true);
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
  if (given->modules_to_save && !given->modules_to_save->empty())
    throw Error("inject", "modules_to_save is not available for C++ models in this version");
  const auto targets = match_targets(*given, module_list(model), model_type(model), strictness);
  auto config = given->clone();
  config->resolve(targets.target_modules, targets.matched);
  std::map<std::string, LinearSlotImpl*> slots;
  for (const auto& [path, slot] : linear_slots(model)) {
    slots[path] = slot;
    if (slot->adapter(name))
      throw Error("inject", fmt::format("an adapter named '{}' is attached already", name));
  }

  // All adapters are made before the first is attached: a failure leaves the model as it was.
  InjectReport report;
  report.warnings = targets.warnings;
  std::vector<std::pair<LinearSlotImpl*, std::shared_ptr<LinearAdapter>>> made;
  for (const auto& path : targets.matched) {
    const auto it = slots.find(path);
    if (it == slots.end() || !method.linear)
      throw Error("inject",
                  fmt::format("'{}' is not a projection: {} attaches to Linear slots only", path,
                              config->peft_type));
    made.emplace_back(it->second, method.linear(config, *it->second, path, place_seed(seed, path)));
    int64_t parameters = 0, rank = 0;
    for (const auto& p : made.back().second->parameters()) parameters += p.numel();
    if (const auto term = made.back().second->low_rank()) rank = term->a.size(0);
    report.places.push_back(
        {path, it->second->out_features(), it->second->in_features(), rank, parameters});
  }
  for (auto& p : model.parameters()) p.set_requires_grad(false);
  for (auto& [slot, adapter] : made) slot->attach(name, std::move(adapter));
  set_active(model, {name});
  count(model, report);
  return report;
}

InjectReport inject(torch::nn::Module& model, std::shared_ptr<const AdapterConfig> config,
                    const std::string& name, uint64_t seed) {
  return inject_matched(model, std::move(config), name, seed, Strictness::strict);
}

void detach(torch::nn::Module& model, const std::string& name) {
  require_known(model, name, "detach");
  for (const auto& [path, slot] : linear_slots(model))
    if (slot->adapter(name)) slot->detach(name);
}

void set_active(torch::nn::Module& model, const std::vector<std::string>& names) {
  for (const auto& name : names) require_known(model, name, "set_active");
  for (auto& p : model.parameters()) p.set_requires_grad(false);
  for (const auto& [path, slot] : linear_slots(model)) {
    slot->set_active(names);
    for (const auto& name : slot->active())
      for (auto& p : slot->adapter(name)->parameters()) p.set_requires_grad(true);
  }
  for (const auto& name : names)
    train_biases(model, first_adapter(model, name)->trained_bias(), name);
}

void merge(torch::nn::Module& model, const std::vector<std::string>& names) {
  for (const auto& name : names) require_known(model, name, "merge");
  const auto slots = linear_slots(model);
  for (const auto& [path, slot] : slots)
    if (!slot->merged().empty())
      throw Error("merge", fmt::format("{} is merged already: unmerge first",
                                       fmt::join(slot->merged(), ", ")));
  for (const auto& [path, slot] : slots) {
    try {
      slot->merge(names);
    } catch (const std::exception& e) {
      unmerge(model);
      throw Error("merge", fmt::format("{}: {}", path, e.what()));
    }
  }
}

void unmerge(torch::nn::Module& model) {
  for (const auto& [path, slot] : linear_slots(model)) slot->unmerge();
}

void set_adapters_enabled(torch::nn::Module& model, bool enabled) {
  for (const auto& [path, slot] : linear_slots(model)) slot->set_adapters_enabled(enabled);
}

DisableAdapters::DisableAdapters(torch::nn::Module& model) : model_(model) {
  set_adapters_enabled(model_, false);
}

DisableAdapters::~DisableAdapters() {
  set_adapters_enabled(model_, true);
}

std::vector<std::pair<std::string, at::Tensor>> trainable_parameters(torch::nn::Module& model) {
  std::vector<std::pair<std::string, at::Tensor>> trained;
  for (const auto& item : model.named_parameters())
    if (item.value().requires_grad()) trained.emplace_back(item.key(), item.value());
  return trained;
}

std::string InjectReport::summary() const {
  // Places that differ only in a layer number are one line.
  std::map<std::string, std::pair<Injected, int64_t>> groups;
  std::vector<std::string> order;
  for (const auto& place : places) {
    const auto leaf = place.path.substr(place.path.rfind('.') + 1);
    const auto key = fmt::format("{} {} {} {}", leaf, place.out, place.in, place.rank);
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
    text += fmt::format("  {:<12} {:>4} x [{}, {}]  rank {:<4} {:>10} parameters\n", place.path,
                        times, place.out, place.in, place.rank, place.parameters * times);
  }
  text += fmt::format(
      "  {} of {} parameters are trained ({:.2f} %)", trainable, total,
      total ? 100.0 * static_cast<double>(trainable) / static_cast<double>(total) : 0.0);
  return text;
}

}  // namespace budwood
