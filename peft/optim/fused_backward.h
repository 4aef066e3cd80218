#pragma once

#include <budwood/peft/optim/optimizer.h>

#include <functional>
#include <memory>
#include <vector>

namespace budwood::optim {

struct FusedOptions {
  double clip_norm = 0.0;   ///< of all gradients together; 0 = no clipping
  double clip_value = 0.0;  ///< of each number of a gradient; 0 = no clipping
};

/// Backward and update in one: each tensor changes as soon as its gradient is complete, which is
/// then freed, so that one gradient is alive at a time (LOMO, arXiv 2306.09782). With any rule.
///
/// Clipping by norm takes two passes over the same graph, the first only for the norm; its result
/// is clip_gradients' and Optimizer::step's. So do fp16 tensors, whose losses are scaled: a pass
/// whose gradients overflow changes nothing but the scale. Gradients cannot be accumulated over
/// several losses: put all of them into one. A backward that is not this
/// object's leaves gradients as ever. A tensor whose gradient comes in two pieces, as one that is
/// used inside and outside of re-entrant checkpointing, is an Error.
class FusedBackward {
 public:
  /// The optimizer is used, not owned.
  FusedBackward(Optimizer& optimizer, FusedOptions options);
  ~FusedBackward();
  FusedBackward(const FusedBackward&) = delete;
  FusedBackward& operator=(const FusedBackward&) = delete;

  struct Result {
    double norm = 0;       ///< of all gradients before clipping; 0 without a norm pass
    bool skipped = false;  ///< fp16 gradients overflowed: nothing has changed
    int64_t updated = 0;   ///< tensors that had a gradient
  };
  /// Differentiates a scalar with its graph and updates. Throws for a gradient that is not finite:
  /// after a norm pass nothing has changed; without one the tensors before it have.
  Result backward(const at::Tensor& loss, double rate);

  /// What the loss is multiplied by: 1 without fp16 tensors.
  double loss_scale() const { return scale_; }
  /// Scale and good steps since it last changed, for a checkpoint.
  NamedTensors state() const;
  void restore(const NamedTensors& state);

 private:
  struct Hooks;
  void receive(size_t index, const at::Tensor& grad);
  void run(const at::Tensor& loss, bool measuring);

  Optimizer& optimizer_;
  FusedOptions options_;
  std::unique_ptr<Hooks> hooks_;
  bool half_ = false, measuring_ = false, running_ = false;
  double scale_ = 1.0, factor_ = 1.0, rate_ = 0.0, sum_ = 0.0;
  int64_t good_steps_ = 0, updated_ = 0;
  std::vector<bool> received_;  // of each parameter, in this pass
};

}  // namespace budwood::optim
