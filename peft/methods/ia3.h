#pragma once

#include <budwood/peft/linear_adapter.h>

#include <cstdint>

namespace budwood {

struct IA3Config;

/// IA3 (arXiv 2205.05638): y = l ∘ (x Wᵀ + b), l [out, 1]; in feed-forward places
/// y = (l ∘ x) Wᵀ + b, l [1, in]. l starts at 1.
class IA3 final : public LinearAdapter {
 public:
  IA3(std::shared_ptr<const IA3Config> config, const LinearBase& base, bool feedforward,
      uint64_t seed);

  LinearTerm term(const LinearBase& base) const override;
  AdapterState state() const override { return {{"ia3_l", l_}}; }
  bool starts_as_identity() const override;

 private:
  bool feedforward_;
  at::Tensor l_;
};

}  // namespace budwood
