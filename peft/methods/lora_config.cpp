#include <budwood/peft/io/text.h>
#include <budwood/peft/json.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/peft/pattern.h>
#include <budwood/peft/targets.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>

namespace budwood {
namespace {

constexpr int64_t kMaxRank = 1 << 20;

Pattern path_pattern(const std::string& pattern) {
  return Pattern("(.*\\.)?(", pattern, ")$");
}

// The value of the first pattern that matches.
template <class T>
std::optional<T> first_match(const PatternMap<T>& patterns, std::string_view path) {
  for (const auto& [pattern, value] : patterns)
    if (path_pattern(pattern).match_at_start(path)) return value;
  return {};
}

bool is_given(const RawJson& value) {
  return value.text != "null";
}

bool is_name(const std::variant<bool, std::string>& init, std::string_view name) {
  const auto* text = std::get_if<std::string>(&init);
  return text && *text == name;
}

// The rest of "pissa_niter_16" as a number, or nothing.
std::optional<int64_t> niter_of(const std::variant<bool, std::string>& init) {
  constexpr std::string_view start = "pissa_niter_";
  const auto* text = std::get_if<std::string>(&init);
  if (!text || !text->starts_with(start)) return {};
  int64_t value = -1;
  const char* end = text->data() + text->size();
  const auto [read, fault] = std::from_chars(text->data() + start.size(), end, value);
  if (fault != std::errc() || read != end || value < 0 || value > 1000) return {};
  return value;
}

// With these the base weight is as it was, so a trained adapter needs nothing of them.
bool keeps_base(const std::variant<bool, std::string>& init) {
  return is_name(init, "eva") || is_name(init, "orthogonal") || is_name(init, "mica");
}

bool known_init(const LoraConfig& c, Strictness strictness) {
  return std::holds_alternative<bool>(c.init_lora_weights) || c.gaussian_init() ||
         c.principal_init() ||
         (strictness == Strictness::lenient && keeps_base(c.init_lora_weights));
}

// Everything of PEFT's LORA that this version cannot do, in one place: the option's name, or
// nothing.
std::optional<std::string> unsupported(const LoraConfig& c, Strictness strictness) {
  if (!known_init(c, strictness)) return "init_lora_weights";
  if (c.target_parameters && !c.target_parameters->empty()) return "target_parameters";
  if (c.layer_replication) return "layer_replication";
  if (c.alora_invocation_tokens) return "alora_invocation_tokens";
  if (c.ensure_weight_tying) return "ensure_weight_tying";
  if (is_given(c.use_bdlora)) return "use_bdlora";
  if (is_given(c.arrow_config)) return "arrow_config";
  if (is_given(c.kasa_config)) return "kasa_config";
  if (is_given(c.velora_config)) return "velora_config";
  if (is_given(c.monteclora_config)) return "monteclora_config";
  return {};
}

// A pattern that matches one path and no other.
std::string exact_pattern(std::string_view path) {
  std::string pattern = "^";
  for (const char c : path) {
    if (std::string_view("\\^$.|?*+()[]{}").find(c) != std::string_view::npos) pattern += '\\';
    pattern += c;
  }
  return pattern;
}

template <class T>
void pin(PatternMap<T>& patterns, const std::vector<std::string>& paths) {
  auto sorted = patterns;
  std::sort(sorted.begin(), sorted.end());
  PatternMap<T> pinned;
  bool moved = false;
  for (const auto& path : paths) {
    const auto value = first_match(patterns, path);
    moved |= value != first_match(sorted, path);
    if (value) pinned.emplace_back(exact_pattern(path), *value);
  }
  if (moved) patterns = std::move(pinned);
}

const bool registered = register_config("LORA", [] { return std::make_shared<LoraConfig>(); });

}  // namespace

int64_t LoraConfig::rank(std::string_view path) const {
  return first_match(rank_pattern, path).value_or(r);
}

double LoraConfig::alpha(std::string_view path) const {
  return first_match(alpha_pattern, path).value_or(lora_alpha);
}

double LoraConfig::scaling(std::string_view path) const {
  const auto rank_here = static_cast<double>(rank(path));
  return alpha(path) / (use_rslora ? std::sqrt(rank_here) : rank_here);
}

double LoraConfig::qalora_factor(int64_t in) const {
  const auto group = static_cast<double>(qalora_group_size);
  if (qalora_pooling == "sum") return 1.0;
  return qalora_pooling == "mean" ? 1.0 / group : static_cast<double>(in) / group / group;
}

bool LoraConfig::gaussian_init() const {
  return is_name(init_lora_weights, "gaussian");
}

std::optional<LoraConfig::Principal> LoraConfig::principal_init() const {
  if (is_name(init_lora_weights, "olora")) return Principal{.orthonormal = true};
  if (is_name(init_lora_weights, "pissa")) return Principal{};
  if (const auto niter = niter_of(init_lora_weights)) return Principal{.iterations = *niter};
  return {};
}

bool LoraConfig::identity_init() const {
  const auto* flag = std::get_if<bool>(&init_lora_weights);
  return !flag || *flag;
}

void LoraConfig::pin_patterns(const std::vector<std::string>& paths) {
  pin(rank_pattern, paths);
  pin(alpha_pattern, paths);
}

void LoraConfig::resolve(const Names& resolved, const std::vector<std::string>& paths,
                         std::string_view /*model_type*/) {
  target_modules = resolved;
  pin_patterns(paths);
}

void LoraConfig::validate(Strictness strictness) const {
  AdapterConfig::validate(strictness);
  const auto refuse = [&](std::string_view fact) { throw Error(peft_type + " config", fact); };
  const auto check_rank = [&](const std::string& name, int64_t value) {
    if (value < 1 || value > kMaxRank)
      refuse(fmt::format("{} is {}; it must be an integer from 1 to {}", name, value, kMaxRank));
  };
  const auto check_alpha = [&](const std::string& name, double value) {
    if (!std::isfinite(value))
      refuse(fmt::format("{} is {}; it must be a finite number", name, value));
  };
  check_rank("r", r);
  check_alpha("lora_alpha", lora_alpha);
  for (const auto& [pattern, value] : rank_pattern) {
    check_rank(fmt::format("rank_pattern[{}]", io::in_quotes(pattern)), value);
    path_pattern(pattern);
  }
  for (const auto& [pattern, value] : alpha_pattern) {
    check_alpha(fmt::format("alpha_pattern[{}]", io::in_quotes(pattern)), value);
    path_pattern(pattern);
  }
  if (!(lora_dropout >= 0.0 && lora_dropout < 1.0))
    refuse(fmt::format("lora_dropout is {}; it must be at least 0 and below 1", lora_dropout));
  if (bias != "none" && bias != "all" && bias != "lora_only")
    refuse(fmt::format("bias is {}; it must be 'none', 'all' or 'lora_only'", io::in_quotes(bias)));
  validate_targets(*target_rules(), peft_type);

  if (lora_bias && use_dora) refuse("lora_bias cannot be used with use_dora");
  if (lora_bias && !std::holds_alternative<bool>(init_lora_weights))
    refuse(fmt::format("lora_bias needs init_lora_weights true or false, not {}",
                       shown(write_value(init_lora_weights))));
  if (use_dora && is_given(megatron_config)) refuse("use_dora cannot be used with megatron_config");
  if (use_qalora) {
    if (qalora_group_size < 1)
      refuse(fmt::format("qalora_group_size is {}; it must be at least 1", qalora_group_size));
    if (qalora_pooling != "scaled_mean" && qalora_pooling != "mean" && qalora_pooling != "sum")
      refuse(fmt::format("qalora_pooling is {}; it must be 'scaled_mean', 'mean' or 'sum'",
                         io::in_quotes(qalora_pooling)));
    if (use_dora || principal_init())
      refuse(
          "use_qalora cannot be used with use_dora, pissa or olora: its change is constant in "
          "groups");
  }
  if (const auto option = unsupported(*this, strictness)) {
    auto copy = *this;
    const auto fields = copy.fields();
    const auto field = std::find_if(fields.begin(), fields.end(),
                                    [&](const auto& f) { return f.name == *option; });
    const bool loftq = is_name(init_lora_weights, "loftq") && *option == "init_lora_weights";
    refuse(fmt::format("{} is {}; this is not available in this version{}", *option,
                       shown(field->write()),
                       loftq ? ": begin with 0, then call start_from_original" : ""));
  }
}

std::shared_ptr<AdapterConfig> LoraConfig::clone() const {
  return std::make_shared<LoraConfig>(*this);
}

std::optional<TargetRules> LoraConfig::target_rules() const {
  TargetRules rules{target_modules, exclude_modules, layers_to_transform, layers_pattern, {}};
  for (const auto& [pattern, rank] : rank_pattern)
    rules.patterns.emplace_back("rank_pattern", pattern);
  for (const auto& [pattern, alpha] : alpha_pattern)
    rules.patterns.emplace_back("alpha_pattern", pattern);
  return rules;
}

std::vector<ConfigField> LoraConfig::fields() {
  auto all = AdapterConfig::fields();
  const auto number = [](std::string name, double& member) {
    auto field = bind_field(std::move(name), member);
    field.write = [&member] { return write_number(member); };
    return field;
  };
  std::vector<ConfigField> own = {bind_field("r", r),
                                  number("lora_alpha", lora_alpha),
                                  bind_field("use_rslora", use_rslora),
                                  bind_field("lora_dropout", lora_dropout),
                                  bind_field("bias", bias),
                                  bind_field("lora_bias", lora_bias),
                                  bind_field("fan_in_fan_out", fan_in_fan_out),
                                  bind_field("init_lora_weights", init_lora_weights),
                                  bind_field("target_modules", target_modules),
                                  bind_field("exclude_modules", exclude_modules),
                                  bind_field("layers_to_transform", layers_to_transform),
                                  bind_field("layers_pattern", layers_pattern),
                                  bind_field("rank_pattern", rank_pattern),
                                  bind_field("alpha_pattern", alpha_pattern),
                                  bind_field("use_dora", use_dora),
                                  bind_field("use_qalora", use_qalora),
                                  bind_field("qalora_group_size", qalora_group_size),
                                  own_text("qalora_pooling", qalora_pooling, "scaled_mean"),
                                  bind_field("target_parameters", target_parameters),
                                  bind_field("trainable_token_indices", trainable_token_indices),
                                  bind_field("layer_replication", layer_replication),
                                  bind_field("alora_invocation_tokens", alora_invocation_tokens),
                                  bind_field("ensure_weight_tying", ensure_weight_tying),
                                  bind_field("use_bdlora", use_bdlora),
                                  bind_field("arrow_config", arrow_config),
                                  bind_field("kasa_config", kasa_config),
                                  bind_field("velora_config", velora_config),
                                  bind_field("monteclora_config", monteclora_config),
                                  bind_field("loftq_config", loftq_config),
                                  bind_field("eva_config", eva_config),
                                  bind_field("corda_config", corda_config),
                                  bind_field("lora_ga_config", lora_ga_config),
                                  bind_field("megatron_config", megatron_config),
                                  bind_field("megatron_core", megatron_core)};
  all.insert(all.end(), std::make_move_iterator(own.begin()), std::make_move_iterator(own.end()));
  return all;
}

}  // namespace budwood
