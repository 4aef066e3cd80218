#pragma once

#include <budwood/peft/block_adapter.h>

#include <cstdint>
#include <string>
#include <vector>

namespace budwood {

struct ReftConfig;

/// ReFT (arXiv 2404.03592) after the blocks, at the first and last positions of each prompt; see
/// reft_config.h. LoReFT's R is C⁻¹ F with F [r, hidden] free and C Cᵀ = F Fᵀ (Cholesky), so that
/// its rows stay orthonormal whatever the optimiser does.
class Reft final : public BlockAdapter {
 public:
  Reft(std::shared_ptr<const ReftConfig> config, int64_t hidden, uint64_t seed);

  at::Tensor edit(at::Tensor stream, const Sequences& sequences) const override;
  AdapterState state() const override;
  AdapterState private_state() const override;
  void loaded(const std::vector<std::string>& found) override;
  bool starts_as_identity() const override { return false; }
  std::vector<at::Tensor> trained() const override;
  int64_t rank() const override;

 private:
  // One group of positions.
  struct Unit {
    std::string name;
    at::Tensor free = {};               // F [r, hidden]
    at::Tensor rotate = {};             // Rᵀ [hidden, r] when it was last asked for
    at::Tensor source = {}, bias = {};  // M [r, hidden], c [r]
  };
  const ReftConfig& own() const;
  Unit unit(const std::string& name, int64_t hidden, at::Generator generator);
  at::Tensor rotation(const Unit& unit) const;
  at::Tensor edited(const Unit& unit, const at::Tensor& rows) const;

  std::vector<Unit> units_;
};

}  // namespace budwood
