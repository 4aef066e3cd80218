#pragma once

#include <budwood/peft/models/blocks.h>
#include <budwood/peft/models/model.h>
#include <functional>
#include <vector>

/// Sequences on their way through a model, block by block.
namespace budwood::models {

/// Sequences that run together, and what the next block reads of them.
struct Running {
  TokenBatch batch;
  at::Tensor x;
};

/// The embedded sequences, in batches of at most so many tokens, a sequence being whole.
std::vector<Running> start_running(CausalLM& model,
                                   const std::vector<std::vector<int64_t>>& sequences,
                                   int64_t tokens);

/// Lets a function look at a slot's inputs while it lives.
class Observation {
 public:
  Observation(LinearSlot slot, std::function<void(const at::Tensor&)> observer)
      : slot_(std::move(slot)) {
    slot_->set_observer(std::move(observer));
  }
  ~Observation() { slot_->set_observer({}); }
  Observation(const Observation&) = delete;
  Observation& operator=(const Observation&) = delete;

 private:
  LinearSlot slot_;
};

}  // namespace budwood::models
