#pragma once

#include <budwood/peft/linear_adapter.h>

#include <cstdint>
#include <string>
#include <vector>

namespace budwood {

struct AdaLoraConfig;

/// AdaLoRA (arXiv 2303.10512): y += κ (D(x) (E ∘ A)ᵀ) Bᵀ with E [r, 1], which starts at 0, and
/// κ = alpha / (init_r + 1e-5), whatever is left of the rank. A and B start at N(0, 0.02²).
///
/// Each step measures the importance of every triplet (a row of A, a column of B and an element of
/// E) from its gradients; the budget of triplets falls by a cubic schedule from init_r to target_r
/// for each place on average, and the least important ones of all places have their E set to 0.
class AdaLora final : public LinearAdapter {
 public:
  AdaLora(std::shared_ptr<const AdaLoraConfig> config, const LinearBase& base,
          const std::string& path, uint64_t seed);

  LinearTerm term(const LinearBase& base) const override;
  /// Once the ranks are final only the triplets that are kept.
  AdapterState state() const override;
  AdapterState private_state() const override;
  AdapterState training_state() const override;
  void describe(AdapterConfig& saved, const std::string& path) const override;
  std::string trained_bias() const override;
  int64_t rank() const override { return lora_a_.size(0); }

  /// κ.
  double scaling() const;
  /// How far A and B are from having orthonormal rows and columns: two norms, to be averaged.
  std::vector<at::Tensor> departures() const;
  /// Moves the averages on by the gradients of this step.
  void measure();
  /// Importance of each triplet [r].
  at::Tensor scores() const;
  void keep(const at::Tensor& kept, bool final);
  /// Sets E of what is not kept to 0 again.
  void mask_again();

 private:
  const AdaLoraConfig& own() const;

  at::Tensor lora_a_, lora_b_, lora_e_;
  bool is_final() const;
  AdapterState averages() const;

  at::Tensor kept_;   // bool [r]: the triplets that the last allocation kept
  at::Tensor final_;  // bool []: whether that was the last
  std::vector<at::Tensor> importance_, uncertainty_;  // of A, B, E
};

/// How many triplets all places together may keep after step t.
int64_t adalora_budget(const AdaLoraConfig& config, int64_t places, int64_t t);

}  // namespace budwood
