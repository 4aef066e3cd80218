#pragma once

#include <budwood/peft/methods/targeted_config.h>

namespace budwood {

/// Bottleneck adapters at the output of sub-layers, with AdapterHub's options (BnConfig):
///
///   f(z) = scaling (U act(D z + b_D) + b_U),  D [bn, hidden], U [hidden, bn],
///   bn = max(1, floor(hidden / reduction_factor))
///
/// The defaults are Pfeiffer's (arXiv 2005.00247, AdapterHub's seq_bn): after the feed-forward part
/// only. Houlsby's (arXiv 1902.00751, double_seq_bn) are houlsby(). One difference: here U starts
/// at 0, so that a fresh adapter leaves the model as it is; "bert" is AdapterHub's start.
struct BottleneckConfig : AdapterConfig {
  BottleneckConfig() : BottleneckConfig("BOTTLENECK") {}
  static BottleneckConfig houlsby();

  bool mh_adapter = false;     ///< after attention
  bool output_adapter = true;  ///< after the feed-forward part
  double reduction_factor = 16;
  PatternMap<double> reduction_factors;  ///< by layer number; "default" for the others
  /// relu, gelu, gelu_new, silu or swish, tanh, sigmoid, leakyrelu, linear, ...
  std::string non_linearity = "relu";
  bool is_parallel = false;  ///< reads the residual stream before the sub-layer, not its output
  /// A number, "learned" (one) or "channel" (one for each of hidden).
  std::variant<double, std::string> scaling = 1.0;
  bool original_ln_before =
      true;  ///< z = the block's norm of h + x (where norms come after), else h
  bool original_ln_after = true;  ///< the block's norm of the result + x, else the result alone
  /// What is added to f(z): "true" = h, "post_add" = h + x, "false" = z.
  std::variant<bool, std::string> residual_before_ln = true;
  bool ln_before = false, ln_after = false;  ///< norms of the adapter's own
  bool adapter_residual_before_ln = false;   ///< the residual is added before ln_after
  bool use_gating = false;                   ///< f times the mean over the sequence of sigmoid(g z)
  double dropout = 0.0;                      ///< of f
  double stochastic_depth = 0.0;             ///< probability that a sequence skips f while training
  std::vector<int64_t> leave_out;            ///< layers without an adapter (AdapterDrop)
  std::string init_weights = "identity";     ///< or "bert", "mam_adapter", "houlsby"

  // Compacter (arXiv 2106.04647): D and U are sums of Kronecker products.
  bool phm_layer = false;
  int64_t phm_dim = 4, phm_rank = 1;
  bool phm_bias = true, learn_phm = true, factorized_phm_W = true, shared_W_phm = false;
  bool shared_phm_rule = true, factorized_phm_rule = false;
  std::string phm_c_init = "normal";
  double phm_init_range = 0.0001;
  std::string hypercomplex_nonlinearity = "glorot-uniform";

  /// The width of the bottleneck in a layer.
  int64_t width(int64_t layer, int64_t hidden) const;
  bool leaves_out(int64_t layer) const;

  void validate(Strictness strictness = Strictness::strict) const override;
  std::shared_ptr<AdapterConfig> clone() const override {
    return std::make_shared<BottleneckConfig>(*this);
  }
  std::vector<ConfigField> fields() override;

 protected:
  using AdapterConfig::AdapterConfig;
};

/// A bottleneck beside the sub-layer (arXiv 2110.04366, AdapterHub's par_bn).
struct ParallelAdapterConfig : BottleneckConfig {
  ParallelAdapterConfig();
  std::shared_ptr<AdapterConfig> clone() const override {
    return std::make_shared<ParallelAdapterConfig>(*this);
  }
};

/// Compacter at Houlsby's places; with mh_adapter = false Compacter++.
struct CompacterConfig : BottleneckConfig {
  CompacterConfig();
  std::shared_ptr<AdapterConfig> clone() const override {
    return std::make_shared<CompacterConfig>(*this);
  }
};

}  // namespace budwood
