#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/adapterhub.h>
#include <budwood/peft/base_weights.h>
#include <budwood/peft/inject.h>
#include <budwood/peft/inject_matched.h>
#include <budwood/peft/io/file.h>
#include <budwood/peft/slot.h>
#include <budwood/peft/tensor_file.h>
#include <budwood/quant/error.h>
#include <map>
#include <set>

namespace budwood {
namespace {

namespace fs = std::filesystem;
const std::string kPrefix = "base_model.model.";
constexpr const char* kWeights = "adapter_model.safetensors";
const std::string kPrivate = "budwood.";

struct Collected {
  std::shared_ptr<AdapterConfig> config;
  std::vector<std::string> paths;  // adapted places
  // By key in the file; writing into them changes the adapter.
  std::map<std::string, at::Tensor> tensors;
  std::map<std::string, at::Tensor> optional;  // what only this library reads
  std::vector<std::pair<std::string, std::shared_ptr<Adapter>>> adapters;  // with the path
};

Collected collect(torch::nn::Module& model, const std::string& name) {
  Collected all;
  std::string bias = "none";
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    const auto* slot = dynamic_cast<Slot*>(item.value().get());
    const auto adapter = slot ? slot->adapter(name) : nullptr;
    if (!adapter) continue;
    const auto path = slot->file_path(item.key());
    if (!all.config) all.config = adapter->config()->clone();
    adapter->describe(*all.config, path);
    all.paths.push_back(path);
    all.adapters.emplace_back(path, adapter);
    bias = adapter->trained_bias();
    // HF PEFT gives whole modules beside virtual tokens a shorter key.
    const bool beside = adapter->companion() && adapter->config()->is_prompt_learning();
    const auto prefix = beside ? std::string("base_model.") : kPrefix;
    for (const auto& [suffix, tensor] : adapter->state())
      all.tensors[prefix + path + "." + suffix] = tensor;
    for (const auto& [key, tensor] : adapter->shared_state())
      (key.starts_with(kPrivate) ? all.optional : all.tensors)[key] = tensor;
    for (const auto& [suffix, tensor] : adapter->private_state())
      all.optional[kPrivate + path + "." + suffix] = tensor;
    const auto* linear = dynamic_cast<const LinearSlotImpl*>(slot);
    if (bias != "none" && linear && linear->bias().defined())
      all.tensors[kPrefix + path + ".base_layer.bias"] = linear->bias();
  }
  if (bias == "all")
    for (const auto& item : model.named_parameters()) {
      const auto& path = item.key();
      if (!path.ends_with(".bias")) continue;
      const auto owner = path.substr(0, path.size() - 5);
      if (std::find(all.paths.begin(), all.paths.end(), owner) == all.paths.end())
        all.tensors[kPrefix + path] = item.value();
    }
  return all;
}

NamedTensors read_weights(const fs::path& folder) {
  if (fs::exists(folder / kWeights)) {
    const auto file = io::SafetensorsFile::open(folder / kWeights);
    NamedTensors tensors;
    for (const auto& info : file.tensors()) tensors.emplace_back(info.name, as_tensor(info));
    return tensors;
  }
  if (fs::exists(folder / "adapter_model.bin")) return read_pickle(folder / "adapter_model.bin");
  throw Error("load_adapter",
              fmt::format("{} has neither {} nor adapter_model.bin", folder.string(), kWeights));
}

// HF PEFT stores the frozen table of an adapted head along; it takes the place of the model's own.
std::set<std::string> take_tables(torch::nn::Module& model, const std::string& name,
                                  const NamedTensors& found) {
  std::set<std::string> keys;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    const auto key = kPrefix + item.key() + ".base_layer.weight";
    if (const auto* table = dynamic_cast<EmbeddingSlotImpl*>(item.value().get());
        table && table->adapter(name)) {
      for (const auto& [stored, tensor] : found) {
        if (stored != key) continue;
        const auto& own = table->weight();
        if (tensor.sizes() != at::IntArrayRef({own.out, own.in}) ||
            !tensor.to(own.dtype()).equal(own.rows(0, own.out, own.dtype())))
          throw Error("load_adapter", fmt::format("{} differs from the model's token table: the "
                                                  "adapter was trained on another base",
                                                  key));
        keys.insert(key);
      }
    }
    auto* slot = dynamic_cast<LinearSlotImpl*>(item.value().get());
    if (!slot || !slot->adapter(name)) continue;
    for (const auto& [stored, tensor] : found) {
      if (stored != key) continue;
      const auto& own = slot->weight();
      if (tensor.sizes() != at::IntArrayRef({own.out, own.in}))
        throw Error("load_adapter",
                    fmt::format("{} is {}, this model wants [{}, {}]: the vocabularies differ", key,
                                io::shape_text({tensor.sizes().data(), tensor.sizes().size()}),
                                own.out, own.in));
      const auto table = tensor.to(own.dtype());
      if (!table.equal(own.rows(0, own.out, own.dtype())))
        slot->replace_weight(quant::Weight::dense(table));
      keys.insert(key);
    }
  }
  return keys;
}

// All faults of a file at once: a person mends them in one go.
void fill(const Collected& wanted, const NamedTensors& found, const std::set<std::string>& tables,
          const std::string& folder) {
  std::string faults;
  const auto add = [&](const std::string& fault) { faults += "\n  " + fault; };
  const auto check = [&](const std::string& key, const at::Tensor& own, const at::Tensor& tensor) {
    if (own.sizes() != tensor.sizes())
      add(fmt::format("shape: {} is {}, this model wants {}", key,
                      io::shape_text({tensor.sizes().data(), tensor.sizes().size()}),
                      io::shape_text({own.sizes().data(), own.sizes().size()})));
    else if (!at::isFloatingType(tensor.scalar_type()))
      add(fmt::format("dtype: {} holds {}", key, c10::toString(tensor.scalar_type())));
    else if (!tensor.isfinite().all().item<bool>())
      add(fmt::format("values: {} holds NaN or infinity", key));
  };
  std::map<std::string, at::Tensor> given;
  for (const auto& [key, tensor] : found) given[key] = tensor;
  for (const auto& [key, tensor] : wanted.tensors)
    if (!given.contains(key)) add(fmt::format("missing: {}", key));
  for (const auto& [key, tensor] : given) {
    if (tables.contains(key)) continue;
    if (const auto it = wanted.tensors.find(key); it != wanted.tensors.end())
      check(key, it->second, tensor);
    else if (const auto it = wanted.optional.find(key); it != wanted.optional.end())
      check(key, it->second, tensor);
    else if (!key.starts_with(kPrivate))
      add(fmt::format("unknown: {}", key));
  }
  if (!faults.empty())
    throw Error("load_adapter", fmt::format("{} does not fit this model:{}", folder, faults));
  at::NoGradGuard no_grad;
  std::vector<std::string> extra;
  for (const auto* part : {&wanted.tensors, &wanted.optional})
    for (const auto& [key, tensor] : *part) {
      const auto it = given.find(key);
      if (it == given.end()) continue;
      auto target = tensor;
      target.copy_(it->second);
      if (part == &wanted.optional) extra.push_back(key);
    }
  for (const auto& [path, adapter] : wanted.adapters) {
    std::vector<std::string> own;
    const auto prefix = kPrivate + path + ".";
    for (const auto& key : extra)
      own.push_back(key.starts_with(prefix) ? key.substr(prefix.size()) : key);
    adapter->loaded(own);
  }
}

}  // namespace

std::vector<std::pair<std::string, at::Tensor>> adapter_tensors(torch::nn::Module& model,
                                                                const std::string& name) {
  const auto all = collect(model, name);
  if (!all.config) throw Error("adapter_tensors", fmt::format("no adapter named '{}'", name));
  NamedTensors tensors(all.tensors.begin(), all.tensors.end());
  tensors.insert(tensors.end(), all.optional.begin(), all.optional.end());
  return tensors;
}

std::shared_ptr<AdapterConfig> adapter_config(torch::nn::Module& model, const std::string& name) {
  const auto all = collect(model, name);
  if (!all.config) throw Error("adapter_config", fmt::format("no adapter named '{}'", name));
  return all.config;
}

void set_adapter_tensors(torch::nn::Module& model, const NamedTensors& tensors,
                         const std::string& source, const std::string& name) {
  const auto all = collect(model, name);
  if (!all.config) throw Error("set_adapter_tensors", fmt::format("no adapter named '{}'", name));
  fill(all, tensors, take_tables(model, name, tensors), source);
}

namespace {

// Of the weights that an adapter changes.
BaseFingerprint base_of(torch::nn::Module& model, const std::string& name) {
  BaseFingerprint base;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    auto* slot = dynamic_cast<Slot*>(item.value().get());
    if (!slot || !slot->adapter(name) || !slot->merged().empty()) continue;
    const auto path = slot->file_path(item.key());
    if (const auto* linear = dynamic_cast<const LinearSlotImpl*>(slot))
      base.weights.push_back(sample_weight(path, linear->weight()));
    else if (const auto* table = dynamic_cast<const EmbeddingSlotImpl*>(slot))
      base.weights.push_back(sample_weight(path, table->weight()));
  }
  return base;
}

}  // namespace

void save_adapter(torch::nn::Module& model, const std::string& folder, const std::string& name) {
  NamedTensors tensors = adapter_tensors(model, name);
  for (const auto& [key, tensor] : tensors)
    if (!tensor.isfinite().all().item<bool>())
      throw Error("save_adapter",
                  fmt::format("'{}' holds NaN or infinity: nothing was written", key));
  const auto config = adapter_config(model, name);
  config->inference_mode = true;  // as HF PEFT saves it
  io::AtomicFolder out(folder, io::Existing::keep_others);
  io::write_file(out.path() / "adapter_config.json", config->to_json());
  io::Metadata metadata = {{"format", "pt"}};
  const auto base = base_of(model, name);
  if (!base.weights.empty()) metadata[kBaseKey] = base.to_json();
  write_tensors(out.path() / kWeights, tensors, metadata);
  out.commit();
}

InjectReport load_adapter(torch::nn::Module& model, const std::string& folder,
                          const std::string& name) {
  if (is_adapterhub_folder(folder)) return load_adapterhub(model, folder, name);
  const auto config = load_adapter_config(folder);
  const auto weights = read_weights(folder);
  auto report = inject_matched(model, config, name, 0, Strictness::lenient);
  report.warnings.insert(report.warnings.begin(), config->warnings.begin(), config->warnings.end());
  try {
    set_adapter_tensors(model, weights, folder, name);
  } catch (...) {
    detach(model, name);
    throw;
  }
  // What was trained may differ now from what a fresh adapter trains.
  set_active(model, {name});
  return report;
}

}  // namespace budwood
