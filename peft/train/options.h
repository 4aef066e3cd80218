#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace budwood {
struct ConfigField;
}

namespace budwood::train {

/// Options of a run. Written beside the adapter as training.json.
struct TrainOptions {
  int64_t steps = 0;              ///< optimiser steps; 0 = by epochs. Takes precedence over epochs
  double epochs = 1.0;            ///< passes over the data, may be a fraction
  int64_t batch_size = 8;         ///< windows of one forward
  int64_t grad_accumulation = 1;  ///< batches of one step; the last step of an epoch may have fewer
  int64_t sequence_length = 512;  ///< tokens of a window, at most
  std::string packing = "pack";   ///< "concat", "pack", "none"; see SampleOptions
  std::string long_rows = "truncate";  ///< "truncate", "split"
  bool shuffle = true;
  /// Every k-th block of the model runs again in the backward instead of keeping what it computed:
  /// 1 = least memory, larger = faster, 0 = none. Does not change results.
  int64_t gradient_checkpointing = 0;

  std::string optimizer = "adamw";  ///< "adamw", or "lora_fa", which leaves A as it is
  double learning_rate = 2e-4;
  double lora_plus_ratio = 1.0;  ///< learning rate of LoRA's B over that of A; 1 = plain LoRA
  double lora_plus_embedding_rate = 1e-6;  ///< of factors of token tables; used with a ratio
  double weight_decay = 0.0;               ///< of tensors with two or more dimensions
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
  std::string schedule = "cosine";  ///< "constant", "linear", "cosine"
  int64_t warmup_steps = 0;
  double warmup_ratio = 0.0;             ///< of all steps, rounded up; used when warmup_steps is 0
  double min_learning_rate_ratio = 0.0;  ///< where the schedule ends, as a part of learning_rate
  double max_grad_norm = 1.0;            ///< of all gradients together; 0 = no clipping
  int64_t seed = 0;                      ///< of the order of the data and of dropout

  int64_t eval_every = 0;    ///< steps; 0 = once, at the end
  int64_t eval_batches = 0;  ///< batches of an evaluation; 0 = all
  int64_t save_every = 0;    ///< steps between checkpoints; 0 = only when interrupted
  int64_t keep_last = 2;     ///< checkpoints kept; 0 = all
  int64_t log_every = 10;    ///< steps

  std::string output;  ///< folder of the run; empty = nothing is written
  /// "" = from the beginning; "auto" = the newest complete checkpoint in output, or from the
  /// beginning when there is none; else a checkpoint folder.
  std::string resume;
  bool overwrite = false;  ///< start although output holds an earlier run, which is removed
  std::string adapter = "default";  ///< name of the adapter that is saved

  /// Throws Error that names the field, its value and what is wanted.
  void validate() const;
  /// Reads a JSON object over the defaults and validates. An unknown key is an Error that names the
  /// nearest one.
  static TrainOptions from_json(std::string_view text, const std::string& source = "options");
  /// All options, sorted by name.
  std::string to_json() const;
  /// Names of the options that differ and that change the numbers of a run.
  std::vector<std::string> differences(const TrainOptions& other) const;

 private:
  std::vector<ConfigField> fields();
};

}  // namespace budwood::train
