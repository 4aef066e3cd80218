#pragma once

#include <budwood/peft/merge.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

/// Several LoRA adapters into one, from their folders, without a model. With D_i = s_i B_i A_i and
/// weights w_i the wanted change of each weight is D = Σ w_i D_i.
namespace budwood {

struct CombineOptions {
  std::vector<MergeSource> adapters;  ///< with their weights
  std::filesystem::path out;          ///< the adapter folder that is written
  /// "cat"        factors side by side: D exactly, ranks add up.
  /// "svd"        the best approximation of D of the given rank.
  /// "linear"     sums of factors of equal rank, as HF PEFT has it: adds cross terms B_i A_j.
  /// "ties"       of each w_i D_i the largest part `density`, averaged where signs agree with that
  ///              of the sum (arXiv 2306.01708), cut to the rank.
  /// "dare"       of each w_i D_i entries at random, `density` of them, over it (arXiv 2311.03099),
  ///              cut to the rank.
  /// "dare_ties"  the trimming of dare, then ties.
  std::string mode = "cat";
  int64_t rank = 0;      ///< of svd, ties and dare; 0 = the largest of the adapters'
  double density = 0.5;  ///< of ties and dare, in (0, 1]
  uint64_t seed = 0;     ///< of dare's choice
  bool overwrite = false;
};

struct CombinedModule {
  std::string path;
  int64_t rank = 0;
  double delta_norm = 0;  ///< ||D||
  double error = 0;       ///< ||D' - D|| / ||D|| with what was written as D'
};

struct CombineReport {
  std::vector<CombinedModule> modules;
  std::vector<std::string> warnings;
};

/// A module that an adapter does not have counts as no change there. The result has scaling 1 in HF
/// PEFT's layout. Throws Error for adapters that are not LoRA, and for DoRA, biases, whole modules,
/// token rows and starts that are taken out of the base: nothing of an adapter is dropped silently.
CombineReport combine(const CombineOptions& options);

}  // namespace budwood
