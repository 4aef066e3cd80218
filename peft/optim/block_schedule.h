#pragma once

#include <budwood/peft/optim/optimizer.h>
#include <cstdint>
#include <string>
#include <vector>

namespace budwood::optim {

/// Which blocks of a model are trained when; the rest is frozen meanwhile, so that gradients and
/// moments of a few blocks exist at a time.
struct BlockOptions {
  /// "lisa" (arXiv 2403.17919): `active` random blocks, and always everything that is in no block
  /// (tables, head, final norm). "badam" (arXiv 2404.02827): one block after the other, and nothing
  /// else.
  std::string kind = "lisa";
  int64_t active = 2;  ///< lisa: blocks of a period
  int64_t every = 20;  ///< steps of a period
  /// badam: "random" (every block once before one comes again), "ascending" or "descending".
  std::string order = "random";
  uint64_t seed = 0;

  void validate() const;
};

/// Blocks are the parameters that share a path up to its first number: "model.layers.3". A block's
/// moments are forgotten when its period begins, so its first update is a first one. The choice is
/// a function of (seed, period): a resumed run makes the same.
class BlockSchedule {
 public:
  /// Throws Error when no path has a number, or there are fewer blocks than are to be active.
  BlockSchedule(const NamedTensors& parameters, BlockOptions options);

  /// Blocks that are trained at a step, counted from 0, in rising order.
  std::vector<int64_t> active(int64_t step) const;
  /// Of each parameter, whether it is trained at a step.
  std::vector<bool> trained(int64_t step) const;
  /// Freezes and thaws parameters for a step, and lets the optimizer forget what it remembers of
  /// those that are frozen now. Call it before the forward of every step.
  void apply(Optimizer& optimizer, int64_t step) const;
  /// Thaws everything.
  void thaw() const;

  /// Paths of the blocks, in their order.
  const std::vector<std::string>& blocks() const { return blocks_; }
  /// Parameters that are in no block and are never trained.
  std::vector<std::string> never_trained() const;

 private:
  NamedTensors parameters_;
  BlockOptions options_;
  std::vector<std::string> blocks_;
  std::vector<int64_t> block_of_;  // parameter -> block, -1 = in none
};

}  // namespace budwood::optim
