#pragma once

#include <budwood/peft/models/model.h>
#include <budwood/peft/train/checkpoint.h>
#include <budwood/peft/train/evaluation.h>
#include <budwood/peft/train/memory_plan.h>
#include <budwood/peft/train/options.h>
#include <budwood/peft/train/sampler.h>
#include <budwood/peft/train/schedule.h>
#include <budwood/peft/train/updater.h>
#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace budwood::train {

/// What is known at a logged step.
struct StepMetrics {
  int64_t step = 0;  ///< steps done
  int64_t total_steps = 0;
  double epoch = 0.0;              ///< passes over the data so far
  double loss = 0.0;               ///< mean over the counted tokens since the last logged step
  double learning_rate = 0.0;      ///< of this step
  double grad_norm = 0.0;          ///< of this step, before clipping; 0 where nobody needs it
  int64_t tokens = 0;              ///< trained on so far
  double tokens_per_second = 0.0;  ///< since the last logged step
  double seconds = 0.0;            ///< since the start of the run
  double eta_seconds = 0.0;        ///< still to come
  double peak_rss_mb = 0.0;        ///< of the process
};

struct TrainResult {
  int64_t steps = 0;         ///< done in all
  bool interrupted = false;  ///< stopped early; the last finished step is in a checkpoint
  double final_loss = 0.0;   ///< last logged loss; NaN when no step was made
  std::optional<Evaluation> evaluation;  ///< at the end
  std::optional<BestLoss> best;
  int64_t tokens = 0;
  double seconds = 0.0;
  double tokens_per_second = 0.0;  ///< of this call's steps, without evaluations and saves
  double peak_rss_mb = 0.0;
  std::vector<std::string> warnings;
};

/// Trains what requires grad in a model, or, with TrainOptions::tune "full", all of it. The loss of
/// a step is the sum over the tokens of all its batches, divided by the number of counted ones. A
/// run that was stopped, killed or interrupted and is resumed gives the same bytes as one that was
/// not.
class Trainer {
 public:
  /// Checks everything that can be checked before the first step, and loads the checkpoint when
  /// options.resume asks for one. eval may be null.
  Trainer(std::shared_ptr<models::CausalLM> model, std::shared_ptr<const Dataset> train,
          std::shared_ptr<const Dataset> eval, TrainOptions options);

  /// Trains to the end, or goes on where an interrupted call stopped. Draws random numbers from
  /// torch's default generators, whose state it gives back as it was. A loss or gradient that is
  /// not finite is an Error that names the step; adapter and checkpoints are those of the step
  /// before.
  TrainResult run();
  /// What a run will need; valid before it. Compare with TrainResult::peak_rss_mb.
  MemoryPlan memory_plan() const;
  /// Loss on the evaluation data as the model is now.
  Evaluation evaluate();
  /// Makes run() write a checkpoint and return; from any thread or callback.
  void request_stop() { stop_ = true; }

  /// Called in run(), in its thread. An exception ends the run and comes out of run().
  std::function<void(const StepMetrics&)> on_log;
  std::function<void(int64_t step, const Evaluation&)> on_evaluation;

  const TrainOptions& options() const { return options_; }
  const SampleReport& train_report() const { return sampler_.report(); }
  const SampleReport* eval_report() const { return eval_ ? &eval_->report() : nullptr; }
  int64_t step() const { return state_.step; }
  int64_t total_steps() const { return state_.total_steps; }

 private:
  struct StepOutcome {
    double learning_rate, grad_norm;
  };
  class Parts;
  at::ScalarType kept_type() const;
  void check(const Dataset& data, const Sampler& sampler) const;
  void resume();
  void restore(const Checkpoint& checkpoint);
  void open_output();
  std::optional<StepOutcome> train_step();
  int64_t select(const std::vector<Batch>& batches, std::vector<std::vector<int64_t>>& rows) const;
  [[noreturn]] void not_finite(const std::string& what, double value) const;
  void log(const StepOutcome& outcome, TrainResult& result);
  void evaluate_and_keep_best(TrainResult& result);
  void save();
  void save_result(const std::filesystem::path& folder);
  void finish(TrainResult& result);
  NamedTensors random_state() const;
  void set_random_state(const NamedTensors& tensors) const;
  bool stop_requested() const;

  std::shared_ptr<models::CausalLM> model_;
  TrainOptions options_;
  Sampler sampler_;
  std::optional<Sampler> eval_;
  std::unique_ptr<Updater> updater_;
  Schedule schedule_;
  RunState state_;
  NamedTensors random_;  // generators between calls of run(); empty before the first
  std::vector<std::string> warnings_;
  std::atomic<bool> stop_ = false;
  double interval_seconds_ = 0.0, run_seconds_ = 0.0;  // in steps only
  int64_t interval_tokens_ = 0, run_tokens_ = 0, run_steps_ = 0;
  int64_t evaluated_step_ = -1, saved_step_ = -1;
  bool opened_ = false, resumed_ = false;
};

}  // namespace budwood::train
