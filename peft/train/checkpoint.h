#pragma once

#include <torch/nn/module.h>

#include <budwood/peft/tensor_file.h>
#include <budwood/peft/train/sampler.h>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

/// Checkpoints: all that a run needs to go on as if it had never stopped (docs/formats.md).
namespace budwood::train {

/// An evaluation that was better than all before.
struct BestLoss {
  int64_t step = 0;
  double loss = 0.0;
};

/// What a run knows besides tensors.
struct RunState {
  int64_t step = 0;  ///< optimiser steps done
  int64_t total_steps = 0;
  int64_t evaluated_step = -1;  ///< of the last evaluation in the metrics
  SamplePosition position;
  int64_t tokens = 0;     ///< trained on so far
  double seconds = 0.0;   ///< spent so far
  double loss_sum = 0.0;  ///< since the last logged step
  int64_t loss_tokens = 0;
  std::optional<BestLoss> best;
  std::string options;  ///< TrainOptions as JSON
  int64_t data_rows = 0, data_tokens = 0;
  uint32_t data_checksum = 0;
  uint32_t base = 0;  ///< base_fingerprint of the model
};

struct Checkpoint {
  RunState state;
  NamedTensors tensors;  ///< parameter.*, exp_avg.*, exp_avg_sq.*, step.*, rng.*
};

/// Writes a checkpoint folder, whole or not at all; one of the same name is replaced.
/// save_adapter(folder) writes the adapter's files into a folder.
void save_checkpoint(const std::filesystem::path& folder, const Checkpoint& checkpoint,
                     const std::function<void(const std::filesystem::path&)>& save_adapter);

/// Reads a checkpoint folder. Throws Error that names folder and file when something is missing,
/// cut short, damaged or of a later version.
Checkpoint load_checkpoint(const std::filesystem::path& folder);

/// "<output>/checkpoint-<step>".
std::filesystem::path checkpoint_path(const std::filesystem::path& output, int64_t step);
/// The checkpoint folders of a run by step, whole or not.
std::vector<std::pair<int64_t, std::filesystem::path>> list_checkpoints(
    const std::filesystem::path& output);
/// The newest checkpoint that is whole, if any; what is wrong with newer ones goes to warnings.
std::optional<Checkpoint> newest_checkpoint(const std::filesystem::path& output,
                                            std::vector<std::string>& warnings);
/// Removes all but the newest `keep` checkpoints; 0 keeps all.
void prune_checkpoints(const std::filesystem::path& output, int64_t keep);
/// Removes a folder of a run in such a way that a kill never leaves half of it under its name.
void remove_folder(const std::filesystem::path& folder);

/// CRC-32 over names, dtypes, shapes and 64 sampled values of every frozen parameter and buffer.
uint32_t base_fingerprint(const torch::nn::Module& model);

}  // namespace budwood::train
