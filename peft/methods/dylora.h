#pragma once

#include <budwood/peft/linear_adapter.h>

#include <cstdint>
#include <memory>

namespace budwood {

struct DyLoraConfig;

/// DyLoRA (arXiv 2210.07558): y += alpha / b (D(x) A[:b]ᵀ) B[:, :b]ᵀ. While training b is drawn for
/// each step, the same in all places; else it is eval_rank, or r. With `frozen` only the b-th row
/// of A and column of B learn in a step.
class DyLora final : public LinearAdapter {
 public:
  DyLora(std::shared_ptr<const DyLoraConfig> config, const LinearBase& base,
         std::shared_ptr<int64_t> drawn, uint64_t seed);

  LinearTerm term(const LinearBase& base) const override;
  AdapterState state() const override;
  int64_t rank() const override { return lora_a_.size(0); }
  /// Draws the rank of a training step for all places.
  void draw(int64_t step);

 private:
  const DyLoraConfig& own() const;

  std::shared_ptr<int64_t> drawn_;  // the rank of the step, shared by all places
  at::Tensor lora_a_, lora_b_;
};

}  // namespace budwood
