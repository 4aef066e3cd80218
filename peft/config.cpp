#include <budwood/peft/config.h>
#include <budwood/peft/io/file.h>
#include <budwood/peft/io/text.h>
#include <budwood/peft/json.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <nlohmann/json.hpp>

namespace budwood {
namespace {

constexpr auto kConfigName = "adapter_config.json";
constexpr uint64_t kMaxConfigBytes = uint64_t{64} << 20;

const std::vector<std::string> kTasks = {"SEQ_CLS",   "SEQ_2_SEQ_LM", "CAUSAL_LM",
                                         "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"};

std::map<std::string, ConfigMaker>& makers() {
  static std::map<std::string, ConfigMaker> table;
  return table;
}

ConfigKind kind_of(const Json& object) {
  if (!object.is_object()) return ConfigKind::unknown;
  if (object.contains("peft_type")) return ConfigKind::peft;
  const auto version = object.find("version");
  if (object.contains("config") && version != object.end() && version->is_string() &&
      version->get<std::string>().starts_with("adapters."))
    return ConfigKind::adapterhub;
  if (object.contains("lora_parameters") || object.contains("fine_tune_type"))
    return ConfigKind::mlx;
  return ConfigKind::unknown;
}

std::string type_of(const Json& object, const std::string& source) {
  const auto refuse = [&](const std::string& fact) {
    throw Error("parse_adapter_config", fmt::format("{} {}", source, fact));
  };
  switch (kind_of(object)) {
    case ConfigKind::adapterhub:
      refuse("is an AdapterHub configuration, not HF PEFT's; convert the adapter first");
      break;
    case ConfigKind::mlx:
      refuse("is an MLX configuration, not HF PEFT's; convert the adapter first");
      break;
    case ConfigKind::unknown:
      refuse(fmt::format("has no peft_type; it must be one of {}",
                         fmt::join(known_peft_types(), ", ")));
      break;
    case ConfigKind::peft:
      break;
  }
  const auto& type = object.at("peft_type");
  if (!type.is_string() || !makers().contains(type.get<std::string>()))
    refuse(fmt::format("has peft_type {}; known are {}", shown(type),
                       fmt::join(known_peft_types(), ", ")));
  return type.get<std::string>();
}

}  // namespace

bool register_config(const std::string& peft_type, ConfigMaker maker) {
  return makers().emplace(peft_type, std::move(maker)).second;
}

std::vector<std::string> known_peft_types() {
  std::vector<std::string> names;
  for (const auto& [name, maker] : makers()) names.push_back(name);
  return names;
}

std::vector<ConfigField> AdapterConfig::fields() {
  return {bind_field("task_type", task_type),
          bind_field("base_model_name_or_path", base_model_name_or_path),
          bind_field("revision", revision),
          bind_field("auto_mapping", auto_mapping),
          bind_field("inference_mode", inference_mode),
          bind_field("modules_to_save", modules_to_save),
          bind_field("peft_version", peft_version)};
}

void AdapterConfig::validate(Strictness) const {
  if (task_type && std::find(kTasks.begin(), kTasks.end(), *task_type) == kTasks.end())
    throw Error(peft_type + " config",
                fmt::format("task_type is {}; it must be null or one of {}",
                            io::in_quotes(*task_type), fmt::join(kTasks, ", ")));
}

std::string AdapterConfig::to_json() const {
  return dump_like_python(all_fields(*this));
}

void set_field(AdapterConfig& config, std::string_view name, const Json& value) {
  Json object = Json::object();
  object[std::string(name)] = value;
  set_fields(config, object, Strictness::strict);
}

void set_fields(AdapterConfig& config, const Json& object, Strictness strictness) {
  const std::string where = config.peft_type + " config";
  if (!object.is_object()) throw Error(where, "a configuration must be a JSON object");
  const auto fields = config.fields();
  for (const auto& [key, value] : object.items()) {
    if (key == "peft_type") {
      if (value.is_string() && value == config.peft_type) continue;
      throw Error(
          where, fmt::format("peft_type is {}; it must be \"{}\"", shown(value), config.peft_type));
    }
    // PEFT fills a missing or empty version with its own, too.
    if (key == "peft_version" && value.is_null()) continue;
    if (key.starts_with("budwood.")) {
      config.private_keys[key] = value.dump();
      continue;
    }
    const auto field = std::find_if(fields.begin(), fields.end(),
                                    [&](const ConfigField& f) { return f.name == key; });
    if (field != fields.end()) {
      if (const char* wanted = field->read(value))
        throw Error(where, fmt::format("{} is {}; it must be {}", key, shown(value), wanted));
    } else if (strictness == Strictness::lenient) {
      config.warnings.push_back(fmt::format("the key {} = {} is unknown and was ignored",
                                            io::in_quotes(key), shown(value)));
    } else {
      std::vector<std::string> known;
      for (const auto& f : fields) known.push_back(f.name);
      throw Error(where, fmt::format("there is no option {}; the nearest is '{}'",
                                     io::in_quotes(key), nearest_name(key, known)));
    }
  }
}

Json all_fields(const AdapterConfig& config) {
  Json object = Json::object();
  object["peft_type"] = config.peft_type;
  // fields() binds members so that they can be set too; here they are only read.
  for (const auto& field : const_cast<AdapterConfig&>(config).fields())
    if (!field.is_usual || !field.is_usual()) object[field.name] = field.write();
  for (const auto& [key, text] : config.private_keys) object[key] = Json::parse(text);
  return object;
}

std::shared_ptr<AdapterConfig> parse_adapter_config(std::string_view text, Strictness strictness,
                                                    const std::string& source) {
  const auto object = parse_ordered_json(text, source);
  auto config = makers().at(type_of(object, source))();
  set_fields(*config, object, strictness);
  config->validate(strictness);
  return config;
}

std::shared_ptr<AdapterConfig> load_adapter_config(const std::filesystem::path& folder) {
  const auto path = folder / kConfigName;
  if (!std::filesystem::is_regular_file(path))
    throw Error("load_adapter_config",
                fmt::format("{} is not a folder with an {}; nothing is downloaded",
                            io::in_quotes(folder.string()), kConfigName));
  return parse_adapter_config(io::read_file(path, kMaxConfigBytes), Strictness::lenient,
                              path.string());
}

void save_adapter_config(const AdapterConfig& config, const std::filesystem::path& folder) {
  config.validate(Strictness::lenient);
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error)
    throw Error("save_adapter_config",
                fmt::format("cannot make the folder {}: {}", io::in_quotes(folder.string()),
                            error.message()));
  io::write_file(folder / kConfigName, config.to_json());
}

ConfigKind config_kind(std::string_view text, const std::string& source) {
  return kind_of(parse_ordered_json(text, source));
}

std::vector<std::string> task_heads(const std::optional<std::string>& task_type) {
  if (task_type == "SEQ_CLS" || task_type == "TOKEN_CLS") return {"classifier", "score"};
  if (task_type == "QUESTION_ANS") return {"qa_outputs"};
  return {};
}

}  // namespace budwood
