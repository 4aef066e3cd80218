#pragma once

#include <budwood/peft/linear_adapter.h>

#include <cstdint>

namespace budwood {

struct VeraConfig;

/// The frozen pair that all places of a VeRA adapter read the first rows and columns of.
struct VeraProjections {
  at::Tensor a;  ///< [r, widest in]
  at::Tensor b;  ///< [widest out, r]
};

/// VeRA (arXiv 2310.11454): y += λ_b ∘ ((λ_d ∘ (D(x) A[:, :in]ᵀ)) B[:out]ᵀ) with λ_b [out], which
/// starts at 0, and λ_d [r] learned.
class Vera final : public LinearAdapter {
 public:
  /// `first` saves the projections for all.
  Vera(std::shared_ptr<const VeraConfig> config, const LinearBase& base,
       std::shared_ptr<VeraProjections> shared, bool first, uint64_t seed);

  LinearTerm term(const LinearBase& base) const override;
  AdapterState state() const override;
  AdapterState shared_state() const override;
  std::string trained_bias() const override;
  bool starts_as_identity() const override;
  int64_t rank() const override { return lambda_d_.size(0); }

 private:
  const VeraConfig& own() const;

  std::shared_ptr<VeraProjections> shared_;
  bool first_;
  at::Tensor lambda_b_, lambda_d_;
};

}  // namespace budwood
