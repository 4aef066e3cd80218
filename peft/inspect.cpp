#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/base_fingerprint.h>
#include <budwood/peft/config.h>
#include <budwood/peft/inspect.h>
#include <budwood/peft/io/gguf.h>
#include <budwood/peft/io/hf_index.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/peft/tensor_file.h>
#include <budwood/quant/error.h>
#include <map>
#include <nlohmann/json.hpp>

namespace budwood {
namespace {

namespace fs = std::filesystem;
using Ordered = nlohmann::ordered_json;

constexpr size_t kShownArray = 8;

Ordered tensor_entry(const io::TensorInfo& info) {
  return {{"name", info.name},
          {"dtype", io::dtype_name(info.dtype)},
          {"shape", info.shape},
          {"bytes", info.bytes()}};
}

int64_t elements(const std::vector<int64_t>& shape) {
  return static_cast<int64_t>(io::element_count(shape).value_or(0));
}

Ordered inspect_safetensors(const fs::path& path) {
  const auto file = io::SafetensorsFile::open(path);
  Ordered result = {
      {"kind", "safetensors"}, {"path", path.string()}, {"metadata", file.metadata()}};
  int64_t parameters = 0;
  Ordered tensors = Ordered::array();
  for (const auto& info : file.tensors()) {
    tensors.push_back(tensor_entry(info));
    parameters += elements(info.shape);
  }
  result["parameters"] = parameters;
  result["tensors"] = std::move(tensors);
  return result;
}

template <typename T>
Ordered scalar_json(const T& value) {
  return value;
}

Ordered array_json(const io::GgufArray& array) {
  return std::visit(
      [](const auto& items) -> Ordered {
        if constexpr (std::is_same_v<std::decay_t<decltype(items)>, std::monostate>) {
          return Ordered::array();
        } else {
          if (items.size() > kShownArray) return fmt::format("{} values", items.size());
          Ordered list = Ordered::array();
          for (const auto& item : items) list.push_back(scalar_json(item));
          return list;
        }
      },
      array);
}

Ordered inspect_gguf(const fs::path& path) {
  const auto file = io::GgufFile::open(path);
  Ordered metadata = Ordered::object();
  for (const auto& [key, value] : file.metadata())
    metadata[key] = std::visit(
        [](const auto& item) -> Ordered {
          if constexpr (std::is_same_v<std::decay_t<decltype(item)>, io::GgufArray>)
            return array_json(item);
          else
            return item;
        },
        value);
  Ordered tensors = Ordered::array();
  std::map<std::string, int64_t> types;
  int64_t parameters = 0;
  for (const auto& tensor : file.tensors()) {
    const std::string type(io::ggml_type_traits(tensor.type).name);
    tensors.push_back(
        {{"name", tensor.name}, {"dtype", type}, {"shape", tensor.shape}, {"bytes", tensor.bytes}});
    ++types[type];
    parameters += elements(tensor.shape);
  }
  return {{"kind", "gguf"},
          {"path", path.string()},
          {"version", file.version()},
          {"architecture", file.get_string("general.architecture", "unknown")},
          {"parameters", parameters},
          {"types", types},
          {"metadata", std::move(metadata)},
          {"tensors", std::move(tensors)}};
}

Ordered inspect_model(const fs::path& folder) {
  const auto config =
      nlohmann::ordered_json::parse(io::read_file(folder / "config.json"), nullptr, false);
  if (config.is_discarded())
    throw Error("inspect", fmt::format("{} is not JSON", (folder / "config.json").string()));
  const auto files = io::ModelFiles::open(folder);
  Ordered tensors = Ordered::array(), shards = Ordered::array();
  std::map<std::string, int64_t> types;
  int64_t parameters = 0;
  for (const auto* info : files.tensors()) {
    tensors.push_back(tensor_entry(*info));
    ++types[std::string(io::dtype_name(info->dtype))];
    parameters += elements(info->shape);
  }
  for (const auto& file : files.files()) shards.push_back(file.path().filename().string());
  return {{"kind", "model"},   {"path", folder.string()}, {"parameters", parameters},
          {"types", types},    {"shards", shards},        {"config", config},
          {"tensors", tensors}};
}

// The module path of a key such as base_model.model.P.lora_A.weight.
std::string module_of(const std::string& key) {
  auto name = key.starts_with("base_model.model.") ? key.substr(17) : key;
  const auto at = name.find(".lora_");
  return at == std::string::npos ? name : name.substr(0, at);
}

Ordered inspect_adapter(const fs::path& folder) {
  const auto config = load_adapter_config(folder);
  const auto file = io::SafetensorsFile::open(folder / "adapter_model.safetensors");
  Ordered tensors = Ordered::array();
  std::map<std::string, Ordered> modules;
  std::map<std::string, int64_t> types;
  int64_t parameters = 0;
  const auto* lora = dynamic_cast<const LoraConfig*>(config.get());
  for (const auto& info : file.tensors()) {
    tensors.push_back(tensor_entry(info));
    ++types[std::string(io::dtype_name(info.dtype))];
    parameters += elements(info.shape);
    auto& entry = modules[module_of(info.name)];
    const auto norm = as_tensor(info).to(at::kDouble).norm().item<double>();
    entry["norms"][info.name.substr(
        info.name.find(".lora_") == std::string::npos ? 0 : info.name.find(".lora_") + 1)] = norm;
  }
  Ordered list = Ordered::array();
  for (auto& [path, entry] : modules) {
    Ordered module = {{"path", path}};
    if (lora) {
      module["rank"] = lora->rank(path);
      module["alpha"] = lora->alpha(path);
      module["scaling"] = lora->scaling(path);
    }
    const auto* a = file.find("base_model.model." + path + ".lora_A.weight");
    const auto* b = file.find("base_model.model." + path + ".lora_B.weight");
    if (lora && a && b) {
      // ||B A|| without the product: trace((Bᵀ B)(A Aᵀ)).
      const auto wa = as_tensor(*a).to(at::kDouble), wb = as_tensor(*b).to(at::kDouble);
      if (wa.dim() == 2 && wb.dim() == 2 && wa.size(0) == wb.size(1)) {
        const auto square = (wb.t().mm(wb) * wa.mm(wa.t())).sum().item<double>();
        module["delta_norm"] = lora->scaling(path) * std::sqrt(std::max(0.0, square));
      }
    }
    module["norms"] = entry["norms"];
    list.push_back(std::move(module));
  }
  auto metadata = file.metadata();
  Ordered base;  // what the adapter remembers of it
  if (const auto it = metadata.find(kBaseKey); it != metadata.end()) {
    const auto remembered = BaseFingerprint::from_json(it->second);
    base = fmt::format("{} ({} {} weights)", remembered.digest(), remembered.weights.size(),
                       remembered.weights.empty() ? "" : remembered.weights[0].form);
    metadata.erase(it);
  }
  return {{"kind", "adapter"},
          {"path", folder.string()},
          {"method", config->peft_type},
          {"base", base},
          {"parameters", parameters},
          {"types", types},
          {"config", Ordered::parse(config->to_json())},
          {"warnings", config->warnings},
          {"metadata", metadata},
          {"modules", std::move(list)},
          {"tensors", std::move(tensors)}};
}

Ordered inspect_folder(const fs::path& folder) {
  if (fs::exists(folder / "adapter_config.json")) return inspect_adapter(folder);
  if (fs::exists(folder / "config.json")) return inspect_model(folder);
  throw Error("inspect",
              fmt::format("'{}' has neither adapter_config.json nor config.json", folder.string()));
}

Ordered inspect_file(const fs::path& path) {
  const auto file = io::MappedFile::open(path);
  if (file->size() >= 4 && std::memcmp(file->data(), "GGUF", 4) == 0) return inspect_gguf(path);
  if (path.extension() == ".gguf") return inspect_gguf(path);
  if (path.extension() == ".safetensors") return inspect_safetensors(path);
  throw Error("inspect",
              fmt::format("'{}' is none of: an adapter or model folder, a .safetensors file, "
                          "a GGUF file",
                          path.string()));
}

}  // namespace

std::string inspect(const fs::path& path) {
  if (!fs::exists(path)) throw Error("inspect", fmt::format("'{}' does not exist", path.string()));
  const auto result = fs::is_directory(path) ? inspect_folder(path) : inspect_file(path);
  return result.dump(2, ' ', false, Ordered::error_handler_t::replace);
}

}  // namespace budwood
