#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/peft/models/gguf_source.h>
#include <budwood/peft/models/hf_source.h>
#include <budwood/peft/models/quantizing_source.h>
#include <budwood/peft/models/registry.h>
#include <budwood/peft/tensor_file.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <map>

namespace budwood::models {
namespace {

namespace fs = std::filesystem;

std::map<std::string, ModelFactory>& factories() {
  static std::map<std::string, ModelFactory> table;
  return table;
}

void require_exists(const std::string& path) {
  if (!fs::exists(path))
    throw Error(
        "load",
        fmt::format("'{}' does not exist; wanted a Hugging Face folder or a GGUF file", path));
}

ModelConfig folder_config(const fs::path& folder) {
  const auto file = folder / "config.json";
  if (!fs::exists(file))
    throw Error("load", fmt::format("'{}' has no config.json", folder.string()));
  return ModelConfig::from_json(io::read_file(file));
}

void require_all_used(const WeightSource& source, const ModelConfig& config,
                      const std::string& path) {
  std::vector<std::string> strays;
  for (const auto& name : source.unused()) {
    // A tied head is sometimes stored again, and old files carry the rotary table.
    if (config.tie_word_embeddings && name == "lm_head.weight") continue;
    if (name.ends_with("rotary_emb.inv_freq")) continue;
    strays.push_back(name);
  }
  if (strays.empty()) return;
  const auto count = strays.size();
  if (strays.size() > 10) strays.resize(10);
  throw Error("load", fmt::format("{}: {} tensors do not belong to a {} model of {} layers: {}{}",
                                  path, count, config.model_type, config.num_hidden_layers,
                                  fmt::join(strays, ", "), count > strays.size() ? ", ..." : ""));
}

bool wants_packed(bool folder, const LoadOptions& options) {
  if (!options.quantize.empty()) {
    quant::require_quantizable(options.quantize);
    quant::require_method(options.quantize, options.quantize_method);
  }
  if (options.weights == "auto") return !folder && options.quantize.empty();
  if (options.weights == "dense") return false;
  if (options.weights != "packed")
    throw Error("load",
                fmt::format("weights is 'auto', 'dense' or 'packed', found '{}'", options.weights));
  if (!folder && !options.quantize.empty())
    throw Error("load",
                fmt::format("packed weights are quantised already: take weights='dense' with "
                            "quantize='{}'",
                            options.quantize));
  return true;
}

std::shared_ptr<CausalLM> build_from(ModelConfig config, WeightSource& source,
                                     const std::string& path, const LoadOptions& options) {
  std::shared_ptr<CausalLM> model;
  if (options.quantize.empty()) {
    model = build(std::move(config), source);
  } else {
    QuantizingSource quantizing(source,
                                {.format = options.quantize,
                                 .block_size = options.block_size,
                                 .double_quant = options.double_quant,
                                 .method = options.quantize_method},
                                options.quantize_skip, options.on_quantized);
    model = build(std::move(config), quantizing);
    const auto defaults = LoadOptions{}.quantize_skip;
    for (const auto& entry : quantizing.unused_skips())
      if (std::find(defaults.begin(), defaults.end(), entry) == defaults.end())
        throw Error("load", fmt::format("quantize_skip '{}' is in the name of no matrix", entry));
  }
  require_all_used(source, model->config(), path);
  return model;
}

}  // namespace

bool register_model(const std::string& model_type, ModelFactory factory) {
  return factories().emplace(model_type, std::move(factory)).second;
}

std::shared_ptr<CausalLM> build(ModelConfig config, WeightSource& source) {
  const auto it = factories().find(config.model_type);
  if (it == factories().end())
    throw Error("load", fmt::format("model type '{}' is not supported", config.model_type));
  auto model = it->second(std::move(config), source);
  model->eval();
  return model;
}

ModelConfig read_config(const std::string& path) {
  require_exists(path);
  return fs::is_directory(path) ? folder_config(path) : GgufSource(path, at::kFloat).config();
}

std::shared_ptr<CausalLM> load(const std::string& path, const LoadOptions& options) {
  require_exists(path);
  const bool folder = fs::is_directory(path), packed = wants_packed(folder, options);
  std::optional<at::ScalarType> dtype;
  if (options.dtype != "auto") dtype = scalar_type_of(options.dtype);
  if (!folder) {
    GgufSource source(path, dtype.value_or(at::kFloat), packed);
    return build_from(source.config(), source, path, options);
  }
  auto config = folder_config(path);
  HfSource source(path, dtype, config.quantization, packed);
  return build_from(std::move(config), source, path, options);
}

}  // namespace budwood::models
