#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/adapterhub.h>
#include <budwood/peft/config.h>
#include <budwood/peft/described.h>
#include <budwood/peft/inject_matched.h>
#include <budwood/peft/io/file.h>
#include <budwood/peft/json.h>
#include <budwood/peft/methods/bottleneck_config.h>
#include <budwood/peft/methods/prompt_config.h>
#include <budwood/peft/slot.h>
#include <budwood/peft/tensor_file.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

namespace budwood {
namespace {

namespace fs = std::filesystem;
const std::string kPrefix = "base_model.model.";
constexpr auto kConfig = "adapter_config.json";

// Keys of AdapterHub's bottleneck that are not options here, with the one value that means nothing.
const std::map<std::string, Json>& without_effect() {
  static const std::map<std::string, Json> table = {
      {"cross_adapter", false},
      {"inv_adapter", nullptr},
      {"inv_adapter_reduction_factor", nullptr},
      {"init_weights_seed", nullptr},
  };
  return table;
}

std::shared_ptr<AdapterConfig> bottleneck_config(const Json& given) {
  std::shared_ptr<BottleneckConfig> config = std::make_shared<BottleneckConfig>();
  if (given.value("is_parallel", false)) config = std::make_shared<ParallelAdapterConfig>();
  if (given.value("phm_layer", false)) config = std::make_shared<CompacterConfig>();
  Json options = Json::object();
  for (const auto& [key, value] : given.items()) {
    if (key == "architecture") continue;
    const auto usual = without_effect().find(key);
    if (usual == without_effect().end()) {
      options[key] = value;
    } else if (key != "init_weights_seed" && key != "inv_adapter_reduction_factor" &&
               value != usual->second) {
      throw Error("adapterhub_config",
                  fmt::format("{} is {}; this is not available", key, shown(value)));
    }
  }
  set_fields(*config, options, Strictness::lenient);
  config->validate(Strictness::lenient);
  return config;
}

int64_t integer_of(const Json& given, const char* key, int64_t usual) {
  const auto it = given.find(key);
  if (it == given.end() || it->is_null()) return usual;
  if (!it->is_number_integer())
    throw Error("adapterhub_config",
                fmt::format("{} is {}; it must be an integer", key, shown(*it)));
  return it->get<int64_t>();
}

std::shared_ptr<AdapterConfig> prefix_config(const Json& given, const Json& whole) {
  auto config = std::make_shared<PrefixTuningConfig>();
  config->num_virtual_tokens = integer_of(given, "prefix_length", 30);
  config->prefix_projection = !given.value("flat", false);
  config->positions = "own";
  if (config->prefix_projection) {
    config->encoder_hidden_size = integer_of(given, "bottleneck_size", 512);
    config->encoder_input_size = integer_of(whole, "hidden_size", 0);
  }
  if (given.value("use_gating", false))
    config->gating = given.value("shared_gating", true) ? "shared" : "separate";
  const auto activation = given.value("non_linearity", std::string("tanh"));
  if (config->prefix_projection && activation != "tanh")
    throw Error(
        "adapterhub_config",
        fmt::format("non_linearity '{}' of a prefix is not available; tanh is", activation));
  config->validate(Strictness::lenient);
  return config;
}

std::shared_ptr<AdapterConfig> prompt_config(const Json& given) {
  auto config = std::make_shared<PromptTuningConfig>();
  config->num_virtual_tokens = integer_of(given, "prompt_length", 10);
  const auto combine = given.value("combine", std::string("prefix"));
  if (combine != "prefix" && combine != "prefix_after_bos")
    throw Error("adapterhub_config", fmt::format("combine '{}' is not known", combine));
  config->placement = combine == "prefix" ? "front" : "after_bos";
  config->among = "embeddings";
  config->validate(Strictness::lenient);
  return config;
}

// A slot's path as AdapterHub writes it: without the child that holds our adapters.
std::string location(const std::string& path) {
  constexpr std::string_view own = ".adapters";
  return path.ends_with(own) ? path.substr(0, path.size() - own.size()) : path;
}

// What stands before the layers: "model", "transformer", "bert"; empty for a bare encoder.
std::string base_of(torch::nn::Module& model) {
  for (const char* name : {"model", "transformer", "bert"})
    if (model.named_children().contains(name)) return name;
  return "";
}

std::string hub_name(const NamedTensors& tensors, const Json& object) {
  if (object.contains("name") && object.at("name").is_string())
    return object.at("name").get<std::string>();
  for (const auto& [key, tensor] : tensors) {
    const auto at = key.find(".adapters.");
    if (at == std::string::npos) continue;
    const auto rest = key.substr(at + 10);
    return rest.substr(0, rest.find('.'));
  }
  throw Error("load_adapterhub", "the configuration has no name of the adapter");
}

// Their key -> ours, for each kind. An empty result stands for a copy that says nothing new.
std::string own_key(const std::string& key, const std::string& hub, const AdapterConfig& config,
                    const std::set<std::string>& locations, const std::string& base) {
  const auto refuse = [&] { return "unknown:" + key; };
  if (config.peft_type == "PREFIX_TUNING") {
    const auto start =
        base + (base.empty() ? "" : ".") + "prefix_tuning.prefix_tunings." + hub + ".self_prefix.";
    const auto gates = ".prefix_tuning.prefix_gates." + hub + ".";
    if (const auto at = key.find(gates); at != std::string::npos)
      return kPrefix + key.substr(0, at) + ".prefix_gate." + key.substr(at + gates.size());
    const auto at = key.find("prefix_tunings." + hub + ".self_prefix.");
    if (at == std::string::npos) return refuse();
    if (!key.starts_with(start)) return "";  // the same table again under a layer
    const auto rest = key.substr(start.size());
    if (rest == "control_trans") return "prompt_embeddings";
    if (rest == "wte.weight") return "budwood.prefix_encoder.embedding.weight";
    if (rest.starts_with("control_trans."))
      return "budwood.prefix_encoder.transform." + rest.substr(14);
    return refuse();
  }
  if (config.peft_type == "PROMPT_TUNING")
    return key.ends_with("prompt_tunings." + hub + ".prompt_embedding.weight") ? "prompt_embeddings"
                                                                               : refuse();
  const auto shared = "shared_parameters." + hub + ".";
  if (const auto at = key.find(shared); at != std::string::npos)
    return kPrefix + "shared_parameters." + key.substr(at + shared.size());
  const auto middle = ".adapters." + hub + ".";
  const auto at = key.find(middle);
  if (at == std::string::npos || !locations.contains(key.substr(0, at))) return refuse();
  auto rest = key.substr(at + middle.size());
  const auto& bottleneck = static_cast<const BottleneckConfig&>(config);
  if (bottleneck.ln_before && rest.starts_with("adapter_down.0.")) return "";  // the norm again
  return key.substr(0, at) + "\n" + rest;
}

struct Places {
  std::map<std::string, std::string> path_of;  // by location
  std::set<std::string> locations;
};

Places block_places(torch::nn::Module& model) {
  Places places;
  for (const auto& item : model.named_modules("", /*include_self=*/false))
    if (dynamic_cast<BlockSlotImpl*>(item.value().get())) {
      places.path_of[location(item.key())] = item.key();
      places.locations.insert(location(item.key()));
    }
  return places;
}

int64_t hidden_of(torch::nn::Module& model) {
  for (const auto& module : model.modules(/*include_self=*/false))
    if (const auto* input = dynamic_cast<InputSlotImpl*>(module.get())) return input->hidden();
  return 0;
}

NamedTensors read_weights(const fs::path& folder) {
  if (fs::exists(folder / "adapter.safetensors")) {
    const auto file = io::SafetensorsFile::open(folder / "adapter.safetensors");
    NamedTensors tensors;
    for (const auto& info : file.tensors()) tensors.emplace_back(info.name, as_tensor(info));
    return tensors;
  }
  if (fs::exists(folder / "pytorch_adapter.bin"))
    return read_pickle(folder / "pytorch_adapter.bin");
  throw Error("load_adapterhub", fmt::format("{} has neither adapter.safetensors nor "
                                             "pytorch_adapter.bin",
                                             folder.string()));
}

Json read_config(const fs::path& folder) {
  return parse_ordered_json(io::read_file(folder / kConfig), (folder / kConfig).string());
}

// BnConfig as AdapterHub writes it.
Json hub_bottleneck(const BottleneckConfig& config) {
  Json all = all_fields(config);
  Json own = Json::object();
  for (const auto& field : BottleneckConfig().fields()) own[field.name] = all[field.name];
  for (const auto& field : BottleneckConfig().AdapterConfig::fields()) own.erase(field.name);
  for (const auto& [key, value] : without_effect()) own[key] = value;
  // Their loader makes the adapter with this start before it reads the values.
  if (config.init_weights == "identity") own["init_weights"] = "bert";
  if (all["reduction_factor"].is_number()) own["reduction_factor"] = config.reduction_factor;
  return own;
}

}  // namespace

bool is_adapterhub_folder(const fs::path& folder) {
  const auto file = folder / kConfig;
  return fs::is_regular_file(file) &&
         config_kind(io::read_file(file), file.string()) == ConfigKind::adapterhub;
}

std::shared_ptr<AdapterConfig> adapterhub_config(const std::string& text) {
  const auto object = parse_ordered_json(text, kConfig);
  if (!object.contains("config") || !object.at("config").is_object())
    throw Error("adapterhub_config", "the file has no object 'config'");
  const auto& given = object.at("config");
  const auto architecture = given.contains("architecture") && given.at("architecture").is_string()
                                ? given.at("architecture").get<std::string>()
                                : std::string();
  if (architecture.empty()) return bottleneck_config(given);
  if (architecture == "prefix_tuning") return prefix_config(given, object);
  if (architecture == "prompt_tuning") return prompt_config(given);
  throw Error("adapterhub_config",
              fmt::format("architecture '{}' is not available; available: bottleneck adapters, "
                          "prefix_tuning, prompt_tuning",
                          architecture));
}

void read_adapterhub(torch::nn::Module& model, const std::string& folder, const std::string& name) {
  const auto object = read_config(folder);
  const auto config = adapter_config(model, name);
  const auto weights = read_weights(folder);
  const auto hub = hub_name(weights, object);
  const int64_t hidden = hidden_of(model);
  if (object.contains("hidden_size") && object.at("hidden_size").is_number_integer() &&
      object.at("hidden_size").get<int64_t>() != hidden)
    throw Error("load_adapterhub",
                fmt::format("{} is for a hidden size of {}, and this model has {}", folder,
                            object.at("hidden_size").dump(), hidden));
  const auto places = block_places(model);
  const auto base = base_of(model);
  NamedTensors own;
  for (const auto& [key, tensor] : weights) {
    const auto mapped = own_key(key, hub, *config, places.locations, base);
    if (mapped.empty()) continue;
    const auto cut = mapped.find('\n');
    own.emplace_back(cut == std::string::npos ? mapped
                                              : kPrefix + places.path_of.at(mapped.substr(0, cut)) +
                                                    "." + mapped.substr(cut + 1),
                     tensor);
  }
  for (const auto& [key, tensor] : adapter_tensors(model, name)) {
    auto found = std::find_if(own.begin(), own.end(), [&](auto& one) { return one.first == key; });
    // Flat tables come as one row; a table that an MLP makes is made anew.
    if (found != own.end() && found->second.numel() == tensor.numel())
      found->second = found->second.reshape(tensor.sizes());
    if (key == "prompt_embeddings" && found == own.end()) own.emplace_back(key, tensor.clone());
  }
  set_adapter_tensors(model, own, folder, name);
}

InjectReport load_adapterhub(torch::nn::Module& model, const std::string& folder,
                             const std::string& name) {
  const auto config = adapterhub_config(io::read_file(fs::path(folder) / kConfig));
  auto report = inject_matched(model, config, name, 0, Strictness::lenient);
  report.warnings.insert(report.warnings.begin(), config->warnings.begin(), config->warnings.end());
  try {
    read_adapterhub(model, folder, name);
  } catch (...) {
    detach(model, name);
    throw;
  }
  set_active(model, {name});
  return report;
}

void save_adapterhub(torch::nn::Module& model, const std::string& folder, const std::string& name) {
  const auto config = adapter_config(model, name);
  const auto places = block_places(model);
  std::map<std::string, std::string> location_of;
  for (const auto& [where, path] : places.path_of) location_of[path] = where;
  const auto base = base_of(model);
  const auto below = base.empty() ? "" : base + ".";
  Json options;
  NamedTensors tensors;
  const auto& type = config->peft_type;
  if (const auto* bottleneck = dynamic_cast<const BottleneckConfig*>(config.get())) {
    options = hub_bottleneck(*bottleneck);
    for (const auto& [key, tensor] : adapter_tensors(model, name)) {
      if (key.starts_with("budwood.")) continue;
      const auto path = key.substr(kPrefix.size());
      if (path.starts_with("shared_parameters.")) {
        tensors.emplace_back(below + "shared_parameters." + name + path.substr(17), tensor);
        continue;
      }
      for (const auto& [own, where] : location_of)
        if (path.starts_with(own + ".")) {
          const auto rest = path.substr(own.size() + 1);
          tensors.emplace_back(where + ".adapters." + name + "." + rest, tensor);
          if (rest.starts_with("adapter_norm_before."))
            tensors.emplace_back(where + ".adapters." + name + ".adapter_down.0." + rest.substr(20),
                                 tensor.clone());
        }
    }
  } else if (type == "PREFIX_TUNING") {
    const auto& prefix = static_cast<const PrefixTuningConfig&>(*config);
    if (prefix.positions != "own")
      throw Error(
          "save_adapterhub",
          "the tokens' positions start after this prefix, and AdapterHub has no such option: "
          "make it with positions='own'");
    const bool fits = prefix.prefix_projection && prefix.encoder_input_size == hidden_of(model);
    bool projected = false;
    const auto start = below + "prefix_tuning.prefix_tunings." + name + ".self_prefix.";
    for (const auto& [key, tensor] : adapter_tensors(model, name)) {
      if (!fits) break;
      if (key == "budwood.prefix_encoder.embedding.weight") {
        projected = true;
        tensors.emplace_back(start + "wte.weight", tensor);
      } else if (key.starts_with("budwood.prefix_encoder.transform.")) {
        tensors.emplace_back(start + "control_trans." + key.substr(33), tensor);
      }
    }
    for (const auto& [key, tensor] : adapter_tensors(model, name)) {
      if (!projected && key == "prompt_embeddings")
        tensors.emplace_back(start + "control_trans", tensor.flatten());
      const auto gate = key.find(".prefix_gate.");
      if (gate != std::string::npos && key.starts_with(kPrefix))
        tensors.emplace_back(key.substr(kPrefix.size(), gate - kPrefix.size()) +
                                 ".prefix_tuning.prefix_gates." + name + key.substr(gate + 12),
                             tensor);
    }
    const int64_t width = projected ? *prefix.encoder_hidden_size : 512;
    options = {{"architecture", "prefix_tuning"},
               {"bottleneck_size", width},
               {"cross_prefix", true},
               {"dropout", 0.0},
               {"encoder_prefix", true},
               {"flat", !projected},
               {"init_weights_seed", nullptr},
               {"leave_out", Json::array()},
               {"non_linearity", "tanh"},
               {"prefix_length", *prefix.num_virtual_tokens},
               {"shared_gating", prefix.gating != "separate"},
               {"use_gating", prefix.gating != "none"}};
  } else if (type == "PROMPT_TUNING") {
    const auto& prompt = static_cast<const PromptTuningConfig&>(*config);
    if (prompt.among != "embeddings")
      throw Error("save_adapterhub",
                  "AdapterHub has virtual tokens among='embeddings' only, and "
                  "these go among words");
    if (prompt.placement != "front" && prompt.placement != "after_bos")
      throw Error("save_adapterhub",
                  fmt::format("AdapterHub has no placement '{}'; it has front and "
                              "after_bos",
                              prompt.placement));
    for (const auto& [key, tensor] : adapter_tensors(model, name))
      if (key == "prompt_embeddings")
        tensors.emplace_back(
            below + "prompt_tuning.prompt_tunings." + name + ".prompt_embedding.weight", tensor);
    options = {{"architecture", "prompt_tuning"},
               {"combine", prompt.placement == "front" ? "prefix" : "prefix_after_bos"},
               {"init_weights_seed", nullptr},
               {"prompt_init", "random_uniform"},
               {"prompt_init_text", nullptr},
               {"prompt_length", *prompt.num_virtual_tokens},
               {"random_uniform_scale", 0.5}};
  } else {
    throw Error("save_adapterhub",
                fmt::format("'{}' is {}, which AdapterHub's layout is not written for; written are "
                            "bottleneck, parallel and Compacter adapters, prefix and prompt tuning",
                            name, type));
  }
  for (const auto& [key, tensor] : tensors)
    if (!tensor.isfinite().all().item<bool>())
      throw Error("save_adapterhub",
                  fmt::format("'{}' holds NaN or infinity: nothing was written", key));
  const auto* described = dynamic_cast<Described*>(&model);
  const Json object = {{"config", options},
                       {"hidden_size", hidden_of(model)},
                       {"model_class", ""},
                       {"model_name", config->base_model_name_or_path.value_or("")},
                       {"model_type", described ? described->model_type() : ""},
                       {"name", name},
                       {"version", "adapters.1.3.0"}};
  io::AtomicFolder out(folder, io::Existing::keep_others);
  io::write_file(out.path() / kConfig, dump_like_python(object));
  write_tensors(out.path() / "adapter.safetensors", tensors);
  out.commit();
}

}  // namespace budwood
