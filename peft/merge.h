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
  /// A Hugging Face folder, plain or quantised (bitsandbytes, GPTQ, AWQ, Budwood), or a GGUF file.
  std::filesystem::path model;
  std::vector<MergeSource> adapters;  ///< folded in this order
  /// A folder, or a file named *.gguf; written whole or not at all.
  std::filesystem::path out;
  /// What becomes of a quantised model. "dequantised": what its codes stand for, plus the change,
  /// in plain numbers. "requantised": rounded to the same kind of codes again, where most of a
  /// small change is lost. "original16": the change is added to `original`, the plain model that
  /// was quantised, not to what the adapter was trained on.
  std::string into = "dequantised";
  std::filesystem::path original;
  /// "auto" (each tensor as it is; what codes stand for in the dtype of the other weights, of a
  /// GGUF file in float32), "float32", "bfloat16" or "float16". In a GGUF file also "q8_0", "q4_0"
  /// and "q4_1", of its matrices; there "auto" keeps blocks that are not changed, and writes what
  /// is changed in float16.
  std::string dtype = "auto";
  uint64_t max_shard_size = 5'000'000'000;  ///< bytes of one weight file
  int jobs = 0;                             ///< threads; 0 = one for each processor
  bool overwrite = false;                   ///< replaces what is there
  /// Merges into a model that is not the one the adapter was trained on, and writes a model of
  /// which less than half of a change is left.
  bool force = false;
  /// Goes on where a merge of the same inputs to the same folder was killed: its whole weight files
  /// are kept. Begins anew when there is nothing to go on with.
  bool resume = false;
  /// Puts what the plain weights were before into merge_backup.safetensors, which
  /// transformers does not read and unmerge_files does.
  bool backup = false;
};

/// What a merge made of one weight W with the change D: R is what was written.
struct MergedTensor {
  std::string name;
  double weight_norm = 0;  ///< of W
  double delta_norm = 0;   ///< of D
  double survival = 1;     ///< <R - W, D> / <D, D>: the part of D that rounding left
  double error = 0;        ///< norm of R - (W + D) over that of D
  /// With "original16": norm of R - (Q + D) over that of D, Q what the codes stand for.
  std::optional<double> distance = {};
};

struct MergeFilesReport {
  std::vector<MergedTensor> merged;   ///< in the order of the files
  std::vector<std::string> replaced;  ///< tensors that an adapter holds whole
  std::vector<std::string> warnings;
  std::vector<std::string> files;  ///< names of the weight files
  uint64_t bytes = 0;              ///< of the weights
  /// merge_report.json, as it stands in the folder, or beside a GGUF file under the file's name
  /// with ".merge_report.json" at its end.
  std::string to_json(const MergeFilesOptions& options) const;
};

/// Why these files cannot be merged piece by piece (an adapter whose start is computed from the
/// base); nothing when they can. Faulty files are merge_files' to name.
std::optional<std::string> why_not_streamed(const MergeFilesOptions& options);

/// Throws Error, with nothing written, for an adapter whose method is no change of weights, tensors
/// without a partner on either side (all of them are named), shapes that do not fit, NaN in a
/// factor, results that are not finite in their dtype, and changes of which less than half is left.
/// The bytes do not depend on jobs, and are those of merging in memory and saving.
///
/// A tied head of which only one side is changed becomes two tensors. Memory: a few panels of
/// 0.5 MB for each thread, the factors of one weight, and of a packed one its codes.
MergeFilesReport merge_files(const MergeFilesOptions& options);

/// How one tensor of a merged model stands to what it should be.
struct VerifiedTensor {
  std::string name;
  bool equal = true;      ///< what merge_files writes in this dtype or these blocks, in every bit
  double delta_norm = 0;  ///< of the change D
  double survival = 1;    ///< as in MergedTensor
  double error = 0;       ///< likewise
  /// The largest distance of a value from the exact one, in steps between neighbours in the dtype
  /// at the largest of old value, change and sum, or between levels of its block of a packed form:
  /// at most 0.5 when rounded once. Infinite when a plain tensor should not have changed and has.
  double steps = 0;
};

struct VerifyFilesReport {
  std::vector<VerifiedTensor> tensors;
  std::vector<std::string> faults;  ///< tensors that are missing, of another shape, or too many
  /// Whether there are no faults, and each tensor is equal or within so many steps.
  bool passed(double steps) const;
  std::string to_json(double steps) const;
};

/// Compares a merged model, the folder or the GGUF file `options.out`, plain or packed, made by
/// whatever tool, with what the model and the adapters make. Reads all of it piece by piece and
/// writes nothing.
VerifyFilesReport verify_files(const MergeFilesOptions& options);

struct UnmergeFilesOptions {
  std::filesystem::path model;        ///< a folder with adapters merged into it
  std::vector<MergeSource> adapters;  ///< which; not needed where there is a backup
  std::filesystem::path base;         ///< the folder that they were merged into, if there is one
  std::filesystem::path out;
  uint64_t max_shard_size = 5'000'000'000;
  int jobs = 0;
  bool overwrite = false;
};

struct UnmergeFilesReport {
  /// "backup" and "base": the weights are what they were, bit for bit. "subtracted": the change was
  /// taken off again, and what two roundings did to it stays.
  std::string from;
  std::vector<std::string> restored;  ///< tensors that were changed back
  std::vector<std::string> warnings;
  /// Of "subtracted": the largest part of a change that its last rounding added.
  double error = 0;
};

/// Writes the model as it was before a merge: from the backup in its folder, from the base, or,
/// for adapters that only add to weights (no DoRA, IA3, nothing trained whole), by subtraction.
UnmergeFilesReport unmerge_files(const UnmergeFilesOptions& options);

}  // namespace budwood
