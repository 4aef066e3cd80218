#include <budwood/peft/convert/lora_set.h>
#include <budwood/peft/io/safetensors.h>
#include <budwood/peft/merge/base_layout.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

namespace budwood {
namespace {

std::map<std::string, LoraFormat>& formats() {
  static std::map<std::string, LoraFormat> all;
  return all;
}

std::vector<std::string> names() {
  std::vector<std::string> all;
  for (const auto& [name, format] : formats()) all.push_back(name);
  return all;
}

}  // namespace

int64_t largest_rank(const std::vector<LoraModule>& modules) {
  int64_t rank = 0;
  for (const auto& module : modules) rank = std::max(rank, module.rank());
  return rank;
}

bool any_magnitude(const std::vector<LoraModule>& modules) {
  return std::any_of(modules.begin(), modules.end(),
                     [](const auto& module) { return module.magnitude.defined(); });
}

std::optional<double> common_scaling(const std::vector<LoraModule>& modules) {
  for (const auto& module : modules)
    if (module.scaling != modules[0].scaling) return {};
  return modules.empty() ? std::optional<double>() : modules[0].scaling;
}

FloatArray scaled(const FloatArray& b, double factor) {
  FloatArray result = b;
  for (auto& value : result.values) value = static_cast<float>(factor * value);
  return result;
}

FloatArray padded_a(const FloatArray& a, int64_t rank) {
  FloatArray result = a;
  result.shape[0] = rank;
  result.values.resize(static_cast<size_t>(rank * a.shape[1]), 0.0f);
  return result;
}

FloatArray padded_b(const FloatArray& b, int64_t rank) {
  return transposed(padded_a(transposed(b), rank));
}

FloatArray transposed(const FloatArray& matrix) {
  const int64_t rows = matrix.shape[0], cols = matrix.shape[1];
  FloatArray result{{cols, rows}, std::vector<float>(matrix.values.size())};
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      result.values[static_cast<size_t>(j * rows + i)] =
          matrix.values[static_cast<size_t>(i * cols + j)];
  return result;
}

ConvertBase::ConvertBase(const std::filesystem::path& path, std::string wanted_for)
    : base_(path.empty() ? nullptr : open_merge_base(path)), wanted_for_(std::move(wanted_for)) {}

const MergeBase& ConvertBase::files() const {
  if (base_ == nullptr)
    throw Error("convert", fmt::format("{} needs the base model: give its folder or GGUF file as "
                                       "model",
                                       wanted_for_));
  return *base_;
}

std::string ConvertBase::text(const std::string& key, const std::string& usual) const {
  const auto& config = files().config();
  if (config.empty()) throw Error("convert", base_->path().string() + " has no config.json");
  const auto json = nlohmann::json::parse(config);
  const auto it = json.find(key);
  return it != json.end() && it->is_string() ? it->get<std::string>() : usual;
}

int64_t ConvertBase::integer(const std::string& key) const {
  const auto& config = files().config();
  if (config.empty()) throw Error("convert", base_->path().string() + " has no config.json");
  const auto json = nlohmann::json::parse(config);
  const auto it = json.find(key);
  if (it == json.end() || !it->is_number_integer())
    throw Error("convert",
                fmt::format("config.json of {} has no integer {}", base_->path().string(), key));
  return it->get<int64_t>();
}

std::string ConvertBase::model_type() const {
  return text("model_type", "");
}

std::string ConvertBase::architecture() const {
  static const std::map<std::string, std::string> known = {
      {"llama", "llama"}, {"mistral", "llama"}, {"qwen2", "qwen2"}, {"qwen3", "qwen3"}};
  const auto type = model_type();
  const auto it = known.find(type);
  if (it == known.end())
    throw Error("convert", fmt::format("GGUF adapters are for llama, mistral, qwen2 and qwen3; {} "
                                       "is '{}'",
                                       base_->path().string(), type));
  return it->second;
}

int64_t ConvertBase::head_dim() const {
  const auto json = nlohmann::json::parse(files().config());
  if (json.contains("head_dim") && json["head_dim"].is_number_integer())
    return json["head_dim"].get<int64_t>();
  return integer("hidden_size") / std::max<int64_t>(1, integer("num_attention_heads"));
}

void ConvertBase::check(const LoraSet& set) const {
  const BaseLayout layout(files());
  std::vector<std::string> faults;
  for (const auto& module : set.modules) {
    const auto* weight = layout.find(module.path + ".weight");
    if (weight == nullptr && module.path == "lm_head") weight = layout.tied_table();
    if (weight == nullptr) {
      faults.push_back(module.path + " has no weight in the model");
      continue;
    }
    const bool turned = module.table || layout.stores_transposed(module.path);
    const std::vector<int64_t> made = {module.b.shape[0], module.a.shape[1]};
    const std::vector<int64_t> wanted =
        turned ? std::vector<int64_t>(weight->shape.rbegin(), weight->shape.rend()) : weight->shape;
    if (made != wanted)
      faults.push_back(fmt::format("{}: the factors make {}, the weight is {}", module.path,
                                   io::shape_text(made), io::shape_text(wanted)));
  }
  if (!faults.empty())
    throw Error("convert", fmt::format("the adapter does not fit {}:\n  {}", base_->path().string(),
                                       fmt::join(faults, "\n  ")));
}

bool register_lora_format(const std::string& name, LoraFormat format) {
  return formats().emplace(name, std::move(format)).second;
}

const LoraFormat& lora_format(const std::string& name) {
  const auto it = formats().find(name);
  if (it == formats().end())
    throw Error("convert",
                fmt::format("unknown format '{}'; known: {}", name, fmt::join(names(), ", ")));
  return it->second;
}

std::optional<std::string> find_lora_format(const std::filesystem::path& path) {
  for (const auto& [name, format] : formats())
    if (format.is(path)) return name;
  return {};
}

std::string lora_format_of(const std::filesystem::path& path) {
  if (!std::filesystem::exists(path)) throw Error("convert", path.string() + " does not exist");
  if (const auto found = find_lora_format(path)) return *found;
  throw Error("convert",
              fmt::format("{} is no adapter of a known format: a folder with "
                          "adapter_model.safetensors (HF PEFT), adapter.safetensors (AdapterHub) "
                          "or adapters.safetensors (MLX), or a GGUF file of type adapter",
                          path.string()));
}

}  // namespace budwood
