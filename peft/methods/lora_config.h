#pragma once

#include <budwood/peft/config.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace budwood {

/// LoRA (arXiv 2106.09685) and what HF PEFT keeps under the same name. An option that is not
/// available in this version can be written down, but validate() refuses every value that would
/// use it.
struct LoraConfig : AdapterConfig {
  LoraConfig() : LoraConfig("LORA") {}

  int64_t r = 8;
  double lora_alpha = 8;
  bool use_rslora = false;  ///< s = alpha / sqrt(r), arXiv 2312.03732
  double lora_dropout = 0.0;
  std::string bias = "none";    ///< "none", "all" or "lora_only": base biases that are trained too
  bool lora_bias = false;       ///< B has a bias
  bool fan_in_fan_out = false;  ///< the base stores [in, out]
  /// true, false (B is random: only for tests), "gaussian"; "pissa" or "pissa_niter_N" (the
  /// principal part of W, arXiv 2404.02948, by N iterations) or "olora" (an orthonormal basis of W,
  /// arXiv 2406.01775). The last three are taken out of the base when they are put in, so that the
  /// model starts as it was.
  std::variant<bool, std::string> init_lora_weights = true;

  Names target_modules;  ///< "all-linear", a regex, names, or nothing: the model's default
  Names exclude_modules;
  Layers layers_to_transform;
  Names layers_pattern;
  PatternMap<int64_t> rank_pattern;  ///< r by pattern of the module path
  PatternMap<double> alpha_pattern;  ///< lora_alpha by pattern

  /// Rows of the token table, or of each named table, that are trained whole.
  TokenIndices trainable_token_indices;
  bool use_dora = false;  ///< learned row norms beside the factors, arXiv 2402.09353

  /// QA-LoRA (arXiv 2309.14717): A reads one value for each group of inputs, so the change is
  /// constant in a group and can be merged into the zero points of a group-affine base.
  bool use_qalora = false;
  int64_t qalora_group_size = 16;
  /// What A reads of a group: "scaled_mean", the mean times the number of groups, as HF PEFT does;
  /// "mean"; "sum".
  std::string qalora_pooling = "scaled_mean";

  // Not available in this version.
  std::optional<std::vector<std::string>> target_parameters;
  LayerRanges layer_replication;
  std::optional<std::vector<int64_t>> alora_invocation_tokens;
  bool ensure_weight_tying = false;
  RawJson use_bdlora, arrow_config, kasa_config, velora_config, monteclora_config;

  // Settings of initialisations and of Megatron: kept, without effect.
  RawJson loftq_config{"{}"}, eva_config, corda_config, lora_ga_config, megatron_config;
  std::optional<std::string> megatron_core = "megatron.core";

  /// The rank at a module path: the first pattern k for which (.*\.)?(k)$ matches, else r.
  int64_t rank(std::string_view path) const;
  /// Likewise lora_alpha.
  double alpha(std::string_view path) const;
  /// alpha / rank, or alpha / sqrt(rank) with use_rslora.
  double scaling(std::string_view path) const;
  /// With use_qalora: what multiplies the scaling where A is spread over the `in` inputs.
  double qalora_factor(int64_t in) const;
  bool gaussian_init() const;
  /// A start that is a part of W.
  struct Principal {
    bool orthonormal = false;           ///< OLoRA
    std::optional<int64_t> iterations;  ///< of a randomised decomposition; nothing = a full one
  };
  std::optional<Principal> principal_init() const;
  /// Whether a fresh adapter leaves the model as it is.
  bool identity_init() const;

  /// PEFT's format sorts the patterns, so overlapping ones may resolve otherwise once saved. If
  /// they would for one of these paths, replaces them by one entry for each path that a pattern
  /// matches.
  void pin_patterns(const std::vector<std::string>& paths);

  void resolve(const Names& resolved, const std::vector<std::string>& paths,
               std::string_view model_type) override;
  void validate(Strictness strictness = Strictness::strict) const override;
  std::shared_ptr<AdapterConfig> clone() const override;
  std::optional<TargetRules> target_rules() const override;
  TokenIndices token_indices() const override { return trainable_token_indices; }
  std::vector<ConfigField> fields() override;

 protected:
  explicit LoraConfig(std::string peft_type) : AdapterConfig(std::move(peft_type)) {}
};

}  // namespace budwood
