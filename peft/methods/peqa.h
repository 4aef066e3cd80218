#pragma once

#include <budwood/peft/linear_adapter.h>

namespace budwood {

struct PeqaConfig;

/// PEQA (arXiv 2305.14152): W[o, j] = σ[o, g] (q[o, j] - z[o, g]) with σ [out, groups] learned and,
/// if asked for, z; they start as those of the base, which is group-affine (int4, int8, GPTQ, AWQ).
/// A run-time weight w stands for σ₀ + w (σ - σ₀). The file holds the scales themselves.
class Peqa final : public LinearAdapter {
 public:
  Peqa(std::shared_ptr<const PeqaConfig> config, const LinearBase& base, const std::string& path);

  LinearTerm term(const LinearBase& base) const override;
  AdapterState state() const override;
  bool composes() const override { return false; }

 private:
  at::Tensor scales_, zeros_;
};

}  // namespace budwood
