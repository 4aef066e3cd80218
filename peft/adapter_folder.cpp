#include <ATen/ATen.h>
#include <fmt/format.h>
#include <torch/csrc/jit/serialization/pickle.h>

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
constexpr const char* kPrefix = "base_model.model.";
constexpr const char* kWeights = "adapter_model.safetensors";
constexpr const char* kPrivate = "budwood.";

struct Collected {
  std::shared_ptr<const AdapterConfig> config;
  std::vector<std::string> paths;             // adapted places
  std::map<std::string, at::Tensor> tensors;  // by key in the file
};

// The tensors that the file of this adapter holds; writing into them changes the adapter.
Collected collect(torch::nn::Module& model, const std::string& name) {
  Collected all;
  std::string bias = "none";
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    const auto* slot = dynamic_cast<LinearSlotImpl*>(item.value().get());
    const auto adapter = slot ? slot->adapter(name) : nullptr;
    if (!adapter) continue;
    all.config = adapter->config();
    all.paths.push_back(item.key());
    bias = adapter->trained_bias();
    for (const auto& [suffix, tensor] : adapter->state())
      all.tensors[kPrefix + item.key() + "." + suffix] = tensor;
    if (bias != "none" && slot->bias().defined())
      all.tensors[kPrefix + item.key() + ".base_layer.bias"] = slot->bias();
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

NamedTensors read_bin(const fs::path& path) {
  const auto bytes = io::read_file(path);
  c10::IValue value;
  try {
    value = torch::jit::pickle_load(std::vector<char>(bytes.begin(), bytes.end()));
  } catch (const std::exception& e) {
    throw Error("load_adapter",
                fmt::format("{} is not a file of tensors: {}", path.string(), e.what()));
  }
  if (!value.isGenericDict())
    throw Error("load_adapter",
                fmt::format("{} is not a plain dictionary of tensors: save it again "
                            "as safetensors",
                            path.string()));
  NamedTensors tensors;
  for (const auto& entry : value.toGenericDict()) {
    if (!entry.key().isString() || !entry.value().isTensor())
      throw Error("load_adapter",
                  fmt::format("{} holds something that is not a named tensor", path.string()));
    tensors.emplace_back(entry.key().toStringRef(), entry.value().toTensor());
  }
  return tensors;
}

NamedTensors read_weights(const fs::path& folder) {
  if (fs::exists(folder / kWeights)) {
    const auto file = io::SafetensorsFile::open(folder / kWeights);
    NamedTensors tensors;
    for (const auto& info : file.tensors()) tensors.emplace_back(info.name, as_tensor(info));
    return tensors;
  }
  if (fs::exists(folder / "adapter_model.bin")) return read_bin(folder / "adapter_model.bin");
  throw Error("load_adapter",
              fmt::format("{} has neither {} nor adapter_model.bin", folder.string(), kWeights));
}

// HF PEFT stores the frozen table of an adapted head along; it takes the place of the model's own.
std::set<std::string> take_tables(torch::nn::Module& model, const std::string& name,
                                  const NamedTensors& found) {
  std::set<std::string> keys;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    auto* slot = dynamic_cast<LinearSlotImpl*>(item.value().get());
    if (!slot || !slot->adapter(name)) continue;
    const auto key = kPrefix + item.key() + ".base_layer.weight";
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
void fill(const std::map<std::string, at::Tensor>& wanted, const NamedTensors& found,
          const std::set<std::string>& tables, const std::string& folder) {
  std::string faults;
  const auto add = [&](const std::string& fault) { faults += "\n  " + fault; };
  std::map<std::string, at::Tensor> given;
  for (const auto& [key, tensor] : found)
    if (!key.starts_with(kPrivate)) given[key] = tensor;
  for (const auto& [key, tensor] : wanted)
    if (!given.contains(key)) add(fmt::format("missing: {}", key));
  for (const auto& [key, tensor] : given) {
    if (tables.contains(key)) continue;
    const auto it = wanted.find(key);
    if (it == wanted.end()) {
      add(fmt::format("unknown: {}", key));
    } else if (it->second.sizes() != tensor.sizes()) {
      add(fmt::format("shape: {} is {}, this model wants {}", key,
                      io::shape_text({tensor.sizes().data(), tensor.sizes().size()}),
                      io::shape_text({it->second.sizes().data(), it->second.sizes().size()})));
    } else if (!at::isFloatingType(tensor.scalar_type())) {
      add(fmt::format("dtype: {} holds {}", key, c10::toString(tensor.scalar_type())));
    } else if (!tensor.isfinite().all().item<bool>()) {
      add(fmt::format("values: {} holds NaN or infinity", key));
    }
  }
  if (!faults.empty())
    throw Error("load_adapter", fmt::format("{} does not fit this model:{}", folder, faults));
  at::NoGradGuard no_grad;
  for (const auto& [key, tensor] : wanted) {
    auto target = tensor;
    target.copy_(given.at(key));
  }
}

}  // namespace

void save_adapter(torch::nn::Module& model, const std::string& folder, const std::string& name) {
  const auto all = collect(model, name);
  if (all.paths.empty()) throw Error("save_adapter", fmt::format("no adapter named '{}'", name));
  NamedTensors tensors;
  for (const auto& [key, tensor] : all.tensors) {
    if (!tensor.isfinite().all().item<bool>())
      throw Error("save_adapter",
                  fmt::format("'{}' holds NaN or infinity: nothing was written", key));
    tensors.emplace_back(key, tensor);
  }
  const auto config = all.config->clone();
  config->inference_mode = true;  // as HF PEFT saves it
  io::AtomicFolder out(folder, io::Existing::keep_others);
  io::write_file(out.path() / "adapter_config.json", config->to_json());
  write_tensors(out.path() / kWeights, tensors);
  out.commit();
}

InjectReport load_adapter(torch::nn::Module& model, const std::string& folder,
                          const std::string& name) {
  const auto config = load_adapter_config(folder);
  const auto weights = read_weights(folder);
  auto report = inject_matched(model, config, name, 0, Strictness::lenient);
  report.warnings.insert(report.warnings.begin(), config->warnings.begin(), config->warnings.end());
  try {
    fill(collect(model, name).tensors, weights, take_tables(model, name, weights), folder);
  } catch (...) {
    detach(model, name);
    throw;
  }
  return report;
}

}  // namespace budwood
