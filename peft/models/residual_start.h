#pragma once

#include <budwood/peft/models/model.h>
#include <budwood/peft/residual.h>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace budwood::models {

struct StartOptions {
  ResidualOptions residual;
  std::string adapter = "default";
  std::vector<std::vector<int64_t>> sequences;  ///< eora: token ids of texts
  int64_t batch_tokens = 2048;                  ///< eora: tokens that go through a block together
  /// Called after each place: how many are done, how many there are, its path.
  std::function<void(int64_t done, int64_t total, const std::string& path)> progress = {};
};

struct StartPlace {
  std::string path;
  int64_t rank = 0;
  double before = 0, after = 0;  ///< errors, as in ResidualStart
  int64_t iteration = 1;
};

struct StartReport {
  std::vector<StartPlace> places;
  /// The base is not the one that was loaded: the adapter is of use only with it, so save it too.
  bool base_changed = false;
};

/// Gives a fresh LoRA adapter on a quantised model the start that residual.h describes. The
/// original weights are streamed from their files, one matrix at a time. "eora" goes through the
/// model block by block, on what the blocks before it, with their adapters, make of the sequences.
/// Throws Error for adapters that are not plain LoRA (DoRA, PiSSA and the like have starts of their
/// own), and for weights that are not quantised.
StartReport start_from_original(CausalLM& model, const std::filesystem::path& original,
                                const StartOptions& options);

}  // namespace budwood::models
