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
  /// In which dtype the forward of a float32 model keeps activations for the backward: "float32",
  /// or "bfloat16" for half the memory and gradients with its rounding; losses stay exact.
  std::string activation_dtype = "float32";

  /// What is trained: the "adapter", or the "full" model, whose weights are plain numbers then.
  std::string tune = "adapter";
  /// "adamw"; "lora_fa", which leaves A as it is; "adamw8bit", with moments of one byte; "galore",
  /// with moments of gradients of low rank; "lomo" and "adalomo", with one gradient alive at a
  /// time; "mezo", without any.
  std::string optimizer = "adamw";
  /// Back-propagates through some tokens of each sequence alone (TokenTune, models/selected.h): 1
  /// or more is so many, below 1 that part of them; 0 = all.
  double selected_tokens = 0.0;
  /// Updates each tensor as soon as its gradient is known, which is then freed, with any optimizer
  /// that has gradients; lomo and adalomo always do. Takes one batch a step.
  bool fused_backward = false;
  /// "all" blocks are trained at each step, or those that optim/block_schedule.h chooses: "lisa",
  /// "badam".
  std::string blocks = "all";
  int64_t active_blocks = 2;           ///< lisa: blocks that are trained at a time
  int64_t block_steps = 20;            ///< steps until others are
  std::string block_order = "random";  ///< badam: "random", "ascending", "descending"
  int64_t galore_rank = 128;
  int64_t galore_refresh = 200;  ///< steps between two decompositions
  double galore_scale = 0.25;    ///< of the update
  double mezo_eps = 1e-3;        ///< how far the two losses lie apart
  double learning_rate = 2e-4;
  double lora_plus_ratio = 1.0;  ///< learning rate of LoRA's B over that of A; 1 = plain LoRA
  double lora_plus_embedding_rate = 1e-6;  ///< of factors of token tables; used with a ratio
  double weight_decay = 0.0;               ///< of tensors with two or more dimensions
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
  std::string schedule = "cosine";  ///< "constant", "linear", "cosine"
  int64_t warmup_steps = 0;
  double warmup_ratio = 0.0;             ///< of all steps, rounded up; used when warmup_steps is 0
  double min_learning_rate_ratio = 0.0;  ///< where the schedule ends, as a part of learning_rate
  /// Of all gradients together; 0 = no clipping. adalomo bounds its updates itself, and lomo takes
  /// a second backward for it.
  double max_grad_norm = 1.0;
  double clip_value = 0.0;  ///< of each number of a gradient; 0 = no clipping
  int64_t seed = 0;         ///< of the order of the data and of dropout

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
  /// Where a fully trained model's tokeniser is: a folder or a GGUF file; empty = none is saved.
  std::string tokenizer_from;

  /// Whether gradients are freed one by one.
  bool updates_during_backward() const {
    return fused_backward || optimizer == "lomo" || optimizer == "adalomo";
  }

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
  void check_optimizer() const;
  std::vector<ConfigField> fields();
};

}  // namespace budwood::train
