#pragma once

#include <budwood/peft/adapter.h>

#include <cstdint>
#include <string>

namespace budwood {

struct LoraConfig;

/// LoRA on a Linear slot (arXiv 2106.09685): y += s (D(x) Aᵀ) Bᵀ [+ s b_B], D = dropout while
/// training. A [r, in] and B [out, r] are fp32 whatever the base is; s = alpha / r, or
/// alpha / sqrt(r) with rsLoRA (arXiv 2312.03732).
class Lora final : public LinearAdapter {
 public:
  /// Initialises A ~ U(±1/sqrt(in)) (or N(0, 1/r²) for "gaussian") and B = 0, so that the slot
  /// starts as its base.
  Lora(std::shared_ptr<const LoraConfig> config, const LinearSlotImpl& slot,
       const std::string& path, uint64_t seed);

  at::Tensor forward(const LinearSlotImpl& slot, const at::Tensor& x, at::Tensor y) override;
  std::optional<LowRank> low_rank() const override;
  at::Tensor merge_rows(const at::Tensor& rows, int64_t begin) const override;
  at::Tensor merge_bias(const at::Tensor& bias) const override;
  AdapterState state() const override;
  std::string trained_bias() const override;

  int64_t rank() const { return lora_a_.size(0); }
  double scaling() const { return scaling_; }

 private:
  double scaling_, dropout_;
  at::Tensor lora_a_, lora_b_;
  at::Tensor bias_;  // of B; undefined without lora_bias
};

}  // namespace budwood
