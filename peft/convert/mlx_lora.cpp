#include <budwood/peft/convert/factors_file.h>
#include <budwood/peft/convert/lora_set.h>
#include <budwood/peft/io/text.h>
#include <budwood/peft/merge/adapter_file.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

/// Folders of MLX LM (mlx-lm 0.32): lora_a [in, r], lora_b [r, out] and one scale for all modules,
/// which is not divided by r. A table's lora_a is [vocabulary, r], its lora_b [r, dim].
namespace budwood {
namespace {

namespace fs = std::filesystem;
constexpr const char* kWeights = "adapters.safetensors";
constexpr const char* kConfig = "adapter_config.json";

bool is_mlx(const fs::path& path) {
  return fs::is_directory(path) && fs::exists(path / kWeights);
}

// Tables are known by their names: their factors look like others.
bool is_table(const std::string& path) {
  return path.ends_with("embed_tokens") || path.ends_with("wte");
}

struct Config {
  bool dora = false;
  double scale = 1.0;
  std::optional<std::string> model;
};

Config read_config(const fs::path& folder) {
  const auto path = (folder / kConfig).string();
  const auto json = io::parse_json(io::read_file(folder / kConfig, 64 << 20), path);
  Config config;
  const auto type = json.value("fine_tune_type", std::string("lora"));
  if (type == "full")
    throw Error("convert", path + " is of a model that was tuned whole, not of an adapter");
  if (type != "lora" && type != "dora")
    throw Error("convert",
                fmt::format("{}: fine_tune_type is '{}', wanted lora or dora", path, type));
  config.dora = type == "dora";
  const auto parameters = json.find("lora_parameters");
  if (parameters == json.end() || !parameters->is_object() || !parameters->contains("scale") ||
      !(*parameters)["scale"].is_number())
    throw Error("convert", path + " has no number lora_parameters.scale");
  config.scale = (*parameters)["scale"].get<double>();
  if (json.contains("model") && json["model"].is_string())
    config.model = json["model"].get<std::string>();
  return config;
}

LoraSet read_mlx(const fs::path& path, const ConvertBase&) {
  const auto config = read_config(path);
  const auto file = io::SafetensorsFile::open(path / kWeights);
  std::map<std::string, LoraModule> modules;
  for (const auto& tensor : file.tensors()) {
    const auto dot = tensor.name.rfind('.');
    const auto suffix = dot == std::string::npos ? "" : tensor.name.substr(dot + 1);
    if (suffix != "lora_a" && suffix != "lora_b" && suffix != "m")
      throw Error("convert", fmt::format("{} holds {}, which is no factor", path.string(),
                                         io::in_quotes(tensor.name)));
    auto array = float_array(tensor);
    if (array.shape.size() != (suffix == "m" ? 1 : 2))
      throw Error("convert", fmt::format("{} has shape {}", io::in_quotes(tensor.name),
                                         io::shape_text(array.shape)));
    auto& module = modules[tensor.name.substr(0, dot)];
    if (suffix == "lora_a") module.a = transposed(array);
    if (suffix == "lora_b") module.b = transposed(array);
    if (suffix == "m") module.magnitude = std::move(array);
  }
  LoraSet set{.base_model = config.model, .task_type = "CAUSAL_LM"};
  for (auto& [name, module] : modules) {
    if (!module.a.defined() || !module.b.defined() || module.a.shape[0] != module.b.shape[1])
      throw Error("convert", fmt::format("{}: lora_a and lora_b do not make a pair", name));
    if (config.dora != module.magnitude.defined())
      throw Error("convert",
                  fmt::format("{}: fine_tune_type is {}, and m is {}", name,
                              config.dora ? "dora" : "lora", config.dora ? "missing" : "there"));
    module.path = name;
    module.scaling = config.scale;
    module.table = is_table(name);
    set.modules.push_back(std::move(module));
  }
  return set;
}

void write_mlx(const fs::path& out, LoraSet& set, const ConvertBase&) {
  const int64_t rank = largest_rank(set.modules);
  const auto scale = common_scaling(set.modules);
  const bool dora = any_magnitude(set.modules);
  std::vector<std::string> keys;
  std::vector<std::pair<std::string, FloatArray>> arrays;
  for (const auto& module : set.modules) {
    if (dora && !module.magnitude.defined())
      throw Error("convert", fmt::format("{} has no magnitude, and MLX has DoRA for all modules or "
                                         "none",
                                         module.path));
    keys.push_back(module.path);
    const auto b = scale ? module.b : scaled(module.b, module.scaling);
    arrays.emplace_back(module.path + ".lora_a", transposed(padded_a(module.a, rank)));
    arrays.emplace_back(module.path + ".lora_b", transposed(padded_b(b, rank)));
    if (dora) arrays.emplace_back(module.path + ".m", module.magnitude);
  }
  std::sort(keys.begin(), keys.end());
  // nlohmann's plain object sorts its keys, as mlx-lm does.
  nlohmann::json config = {
      {"fine_tune_type", dora ? "dora" : "lora"},
      {"num_layers", -1},
      {"lora_parameters",
       {{"rank", rank}, {"scale", scale.value_or(1.0)}, {"dropout", 0.0}, {"keys", keys}}}};
  if (set.base_model) config["model"] = *set.base_model;
  io::AtomicFolder folder(out, io::Existing::replace);
  io::write_file(folder.path() / kConfig, config.dump(4));
  write_factors(folder.path() / kWeights, arrays, {});
  folder.commit();
}

const bool registered =
    register_lora_format("mlx", {.is = is_mlx, .read = read_mlx, .write = write_mlx});

}  // namespace
}  // namespace budwood
