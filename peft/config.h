#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

/// Configurations of adapters: plain structs whose fields have HF PEFT's names, defaults and
/// meanings. The JSON they are read from and written to is PEFT's adapter_config.json.
namespace budwood {

struct ConfigField;

/// Who wrote a configuration. `strict`: a person, so what is unknown or has no effect is an Error.
/// `lenient`: a saved folder, maybe of another version, so such things are collected as warnings.
enum class Strictness { strict, lenient };

/// Names of modules: none given, a list of names, or one regular expression.
using Names = std::variant<std::monostate, std::vector<std::string>, std::string>;
/// Layer indices: none given, one, or several.
using Layers = std::variant<std::monostate, int64_t, std::vector<int64_t>>;
/// Values by pattern of a module path, in the order of the file: the first that matches counts.
template <class T>
using PatternMap = std::vector<std::pair<std::string, T>>;
/// Ids of tokens, for the input embedding or for each named table.
using TokenIndices =
    std::variant<std::monostate, std::vector<int64_t>, PatternMap<std::vector<int64_t>>>;
/// Blocks [begin, end) in the order in which they are run.
using LayerRanges = std::optional<std::vector<std::array<int64_t, 2>>>;
/// A value that is kept as JSON text because nothing here acts on it.
struct RawJson {
  std::string text = "null";
};

/// What decides which modules a configuration targets; see targets.h.
struct TargetRules {
  Names target_modules, exclude_modules;
  Layers layers_to_transform;
  Names layers_pattern;
  /// {option, pattern} of values that are set for some modules only, as rank_pattern.
  std::vector<std::pair<std::string, std::string>> patterns;
};

/// What all configurations have. A method derives from it, lists its fields and registers itself.
struct AdapterConfig {
  explicit AdapterConfig(std::string type) : peft_type(std::move(type)) {}
  virtual ~AdapterConfig() = default;

  std::string peft_type;  ///< HF PEFT's name of the method: "LORA", ...
  /// SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL_LM, TOKEN_CLS, QUESTION_ANS or FEATURE_EXTRACTION.
  std::optional<std::string> task_type;
  std::optional<std::string> base_model_name_or_path, revision;  ///< recorded, never opened
  RawJson auto_mapping;  ///< base_model_class and parent_library when there is no task_type
  bool inference_mode = false;
  std::optional<std::vector<std::string>> modules_to_save;  ///< trained and saved whole
  std::optional<std::string> peft_version = "0.21.0";       ///< PEFT's format that is written
  /// Keys that begin with "budwood.", as JSON text; HF PEFT skips them with a warning.
  std::map<std::string, std::string> private_keys;
  /// What the reader of a saved configuration had to say. Never written.
  std::vector<std::string> warnings;

  /// Throws Error for a value or a combination that means nothing or is not available.
  virtual void validate(Strictness strictness = Strictness::strict) const;
  /// adapter_config.json as HF PEFT lays it out: indent 2, keys sorted, ASCII, no final newline.
  std::string to_json() const;
  virtual std::shared_ptr<AdapterConfig> clone() const = 0;
  /// How modules are chosen; nothing for methods that do not choose modules.
  virtual std::optional<TargetRules> target_rules() const { return {}; }
  /// Rows of token tables that are trained along; nothing for methods without the option.
  virtual TokenIndices token_indices() const { return {}; }
  /// Writes down what matching found, so that a saved configuration means the same modules again.
  virtual void resolve(const Names& /*target_modules*/, const std::vector<std::string>& /*paths*/,
                       std::string_view /*model_type*/) {}
  /// Whether the method prepends virtual tokens.
  virtual bool is_prompt_learning() const { return false; }
  /// The options by name, bound to this object's members; see json.h. A method appends its own.
  virtual std::vector<ConfigField> fields();
};

/// Makes a new configuration with default values.
using ConfigMaker = std::function<std::shared_ptr<AdapterConfig>()>;
/// Adds a method; called from a static object in the method's own source file.
bool register_config(const std::string& peft_type, ConfigMaker maker);
std::vector<std::string> known_peft_types();

/// Reads and validates a configuration. `source` stands for the text in errors.
std::shared_ptr<AdapterConfig> parse_adapter_config(
    std::string_view text, Strictness strictness,
    const std::string& source = "adapter_config.json");
/// Reads adapter_config.json of a folder, lenient. Nothing is ever downloaded.
std::shared_ptr<AdapterConfig> load_adapter_config(const std::filesystem::path& folder);
/// Writes adapter_config.json into a folder, which is made when it does not exist.
void save_adapter_config(const AdapterConfig& config, const std::filesystem::path& folder);

/// Whose adapter_config.json a text is; all three use the same file name.
enum class ConfigKind { peft, adapterhub, mlx, unknown };
ConfigKind config_kind(std::string_view text, const std::string& source = "adapter_config.json");

/// The heads that HF PEFT trains with a task: classifier and score for SEQ_CLS and TOKEN_CLS,
/// qa_outputs for QUESTION_ANS.
std::vector<std::string> task_heads(const std::optional<std::string>& task_type);

}  // namespace budwood
