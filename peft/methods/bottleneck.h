#pragma once

#include <budwood/peft/block_adapter.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace budwood {

struct BottleneckConfig;

/// A projection y = x Wᵀ + b of an adapter's own: plain, or a sum of Kronecker products
/// W = Σ_i (C_i ⊗ S_i T_i)ᵀ with C_i [n, n], S_i [in/n, k], T_i [k, out/n] (Compacter, arXiv
/// 2106.04647), which is never formed.
struct AdapterProjection {
  at::Tensor weight;  ///< [out, in]; plain
  at::Tensor rule;    ///< C [n, n, n]
  at::Tensor left,
      right;        ///< S [n, in/n, k], T [n, k, out/n]; without factors left is [n, in/n, out/n]
  at::Tensor bias;  ///< [out] or undefined
  at::Tensor operator()(const at::Tensor& x) const;
};

/// A bottleneck at the output of a sub-layer; see bottleneck_config.h for the formula and
/// block_adapter.h for h, x and norm.
class Bottleneck final : public BlockAdapter {
 public:
  /// What all places share: Compacter's rule. `first` trains and saves it for all.
  struct Shared {
    at::Tensor rule;
  };
  Bottleneck(std::shared_ptr<const BottleneckConfig> config, int64_t layer, int64_t hidden,
             std::shared_ptr<Shared> shared, bool first, uint64_t seed);

  at::Tensor forward(at::Tensor h, const at::Tensor& x, const Norm& norm,
                     const Sequences& sequences) const override;
  AdapterState state() const override;
  AdapterState shared_state() const override;
  bool starts_as_identity() const override;
  int64_t rank() const override { return width_; }
  std::vector<at::Tensor> read_elsewhere() const override;

 private:
  const BottleneckConfig& own() const;
  AdapterProjection projection(const char* name, int64_t in, int64_t out, at::Generator generator);
  at::Tensor bottleneck(const at::Tensor& z, const Sequences& sequences) const;

  std::shared_ptr<Shared> shared_;
  bool first_;
  int64_t width_, hidden_;
  AdapterProjection down_, up_;
  at::Tensor scaling_;                                                  // learned
  at::Tensor gate_weight_, gate_bias_;                                  // [1, hidden], [1]
  at::Tensor before_weight_, before_bias_, after_weight_, after_bias_;  // own norms
};

/// The activation that a configuration names, of x.
at::Tensor activate(const std::string& name, const at::Tensor& x);

}  // namespace budwood
