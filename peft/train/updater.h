#pragma once

#include <torch/nn/module.h>

#include <budwood/peft/optim/optimizer.h>
#include <budwood/peft/train/options.h>
#include <cstdint>
#include <filesystem>
#include <memory>

namespace budwood::train {

/// The loss of one step, in parts that add up to its mean: one for each of its batches.
class StepLoss {
 public:
  virtual ~StepLoss() = default;
  virtual int64_t parts() const = 0;
  /// A number, with its graph where gradients are on. Throws when it is not finite.
  virtual at::Tensor part(int64_t index) = 0;
};

/// What makes a step out of a loss: TrainOptions::optimizer and its kind. A step that throws has
/// changed nothing, unless it says so.
class Updater {
 public:
  virtual ~Updater() = default;
  /// Before the forward of a step, counted from 0.
  virtual void begin(int64_t step) { (void)step; }
  /// Updates the parameters. Returns the norm of the gradient before clipping, or what stands for
  /// it.
  virtual double step(StepLoss& loss, double rate) = 0;
  /// Gradients that are left are not needed any more.
  virtual void end() {}

  /// All that ever changes, by path.
  virtual const NamedTensors& parameters() const = 0;
  /// With the parameters all that a checkpoint needs.
  virtual NamedTensors state() const = 0;
  virtual void restore(const NamedTensors& state) = 0;
  /// Bytes of gradients and of state() at their highest.
  virtual int64_t gradient_bytes() const = 0;
  virtual int64_t state_bytes() const = 0;
  /// Files beside the result of a finished run.
  virtual void save_extras(const std::filesystem::path& folder) const { (void)folder; }
};

/// What the options ask for, over all that requires grad in a model. Throws Error for what does not
/// go together.
std::unique_ptr<Updater> make_updater(torch::nn::Module& model, const TrainOptions& options);

}  // namespace budwood::train
