#pragma once

#include <budwood/peft/config.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

/// Which modules of a model a configuration targets: HF PEFT's rules, with every entry accounted
/// for. Paths are relative to the base model: "model.layers.0.self_attn.q_proj".
namespace budwood {

enum class ModuleKind { linear, conv1d, embedding, convolution, other };

/// A module of the model. All named modules are given, containers too: they decide whether a short
/// name is unambiguous.
struct ModuleInfo {
  std::string path;
  ModuleKind kind = ModuleKind::other;
  bool is_output_embedding = false;  ///< what get_output_embeddings() returns
};

/// How many of the matched modules one entry of a configuration stands for.
struct PatternHits {
  std::string option;   ///< "target_modules", "rank_pattern", ...
  std::string pattern;  ///< the entry
  int64_t hits = 0;
};

struct TargetReport {
  std::vector<std::string> matched;  ///< in the order of the modules given
  std::vector<PatternHits> hits;
  std::vector<std::string> warnings;
  /// target_modules as it is to be saved: defaults and "all-linear" resolved, long lists reduced.
  Names target_modules;
};

/// Applies the rules in PEFT's order: exclude_modules, modules_to_save, target_modules (regex: full
/// match; list: equal to an entry, or ends with "." + entry and in the wanted layers).
///
/// An entry of target_modules, rank_pattern, alpha_pattern or layers_to_transform that stands for
/// nothing is an Error (strict) or a warning (lenient). No match at all, and a match that is
/// neither Linear, Conv1D nor Embedding, are always Errors. `model_type` is config.json's
/// ("llama"), empty for a model that is not from transformers.
TargetReport match_targets(const AdapterConfig& config, const std::vector<ModuleInfo>& modules,
                           const std::string& model_type, Strictness strictness);
/// The same with another task_type than the config's own.
TargetReport match_targets(const AdapterConfig& config, const std::vector<ModuleInfo>& modules,
                           const std::string& model_type,
                           const std::optional<std::string>& task_type, Strictness strictness);

/// Throws Error for combinations that PEFT refuses and for regular expressions with a fault.
void validate_targets(const TargetRules& rules, const std::string& peft_type);

/// PEFT's target_modules of "LORA", "IA3" or "ADALORA" for a model type when none are given.
std::optional<Names> default_target_modules(std::string_view peft_type,
                                            std::string_view model_type);
/// The feed-forward part of IA3's.
std::optional<std::vector<std::string>> default_feedforward_modules(std::string_view model_type);

/// The fewest, shortest path ends that hold for all `targets` and for none of `others`. Sorted.
std::vector<std::string> minimal_suffixes(const std::vector<std::string>& targets,
                                          const std::vector<std::string>& others);

}  // namespace budwood
