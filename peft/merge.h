#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

/// Folding adapters into the files of a model, without loading it: one panel of rows after another
/// is read, changed in fp64, rounded once and written. A model on slots that is in memory is merged
/// by inject.h.
namespace budwood {

struct MergeSource {
  std::filesystem::path path;  ///< an adapter folder of HF PEFT's layout
  double weight = 1.0;         ///< multiplies what it changes
};

struct MergeFilesOptions {
  std::filesystem::path model;        ///< a Hugging Face folder of plain weights
  std::vector<MergeSource> adapters;  ///< folded in this order
  std::filesystem::path out;          ///< the folder that is written, whole or not at all
  /// "auto" (each tensor as it is), "float32", "bfloat16" or "float16".
  std::string dtype = "auto";
  uint64_t max_shard_size = 5'000'000'000;  ///< bytes of one weight file
  int jobs = 0;                             ///< threads; 0 = one for each processor
  bool overwrite = false;                   ///< replaces a folder that is there
};

/// What a merge made of one weight W with the change D: R is what was written.
struct MergedTensor {
  std::string name;
  double weight_norm = 0;  ///< of W
  double delta_norm = 0;   ///< of D
  double survival = 1;     ///< <R - W, D> / <D, D>: the part of D that rounding left
  double error = 0;        ///< norm of R - (W + D) over that of D
};

struct MergeFilesReport {
  std::vector<MergedTensor> merged;   ///< in the order of the files
  std::vector<std::string> replaced;  ///< tensors that an adapter holds whole
  std::vector<std::string> warnings;
  std::vector<std::string> files;  ///< names of the weight files
  uint64_t bytes = 0;              ///< of the weights
  /// merge_report.json, as it stands in the folder.
  std::string to_json(const MergeFilesOptions& options) const;
};

/// Why these files cannot be merged piece by piece (a GGUF file, a quantised base, an adapter whose
/// start is computed from the base); nothing when they can. Faulty files are merge_files' to name.
std::optional<std::string> why_not_streamed(const MergeFilesOptions& options);

/// Throws Error, with nothing written, for an adapter whose method is no change of weights, tensors
/// without a partner on either side (all of them are named), shapes that do not fit, NaN in a
/// factor, and results that are not finite in their dtype. The bytes do not depend on jobs, and are
/// those of merging in memory and saving.
///
/// A tied head of which only one side is changed becomes two tensors. Memory: a few panels of
/// 0.5 MB for each thread, and the factors of one weight.
MergeFilesReport merge_files(const MergeFilesOptions& options);

/// How one tensor of a merged model stands to what it should be.
struct VerifiedTensor {
  std::string name;
  bool equal = true;      ///< byte for byte what merge_files writes in this dtype
  double delta_norm = 0;  ///< of the change D
  double survival = 1;    ///< as in MergedTensor
  double error = 0;       ///< likewise
  /// The largest distance of a value from the exact one, in steps between neighbours in the dtype
  /// at the largest of old value, change and sum: at most 0.5 when rounded once. Infinite when the
  /// tensor should not have changed and has.
  double steps = 0;
};

struct VerifyFilesReport {
  std::vector<VerifiedTensor> tensors;
  std::vector<std::string> faults;  ///< tensors that are missing, of another shape, or too many
  /// Whether there are no faults, and each tensor is equal or within so many steps.
  bool passed(double steps) const;
  std::string to_json(double steps) const;
};

/// Compares a merged model, `options.out`, made by whatever tool, with what the model and the
/// adapters make. Reads all of it piece by piece and writes nothing.
VerifyFilesReport verify_files(const MergeFilesOptions& options);

}  // namespace budwood
