#pragma once

#include <budwood/peft/base_fingerprint.h>
#include <budwood/peft/merge.h>
#include <budwood/peft/merge/adapter_file.h>
#include <budwood/peft/merge/base_layout.h>
#include <budwood/peft/merge/merge_base.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace budwood {

/// Of a stack of experts, what changes a tensor.
struct ExpertEdit {
  std::shared_ptr<const AdapterFile::Stack> stack;
  std::string parameter;  ///< path of the stack in transformers' model
  int64_t expert = 0;     ///< of a tensor [out, in] that is one expert's
  int64_t first = 0;      ///< and which of the stack's rows it holds
  bool all = false;       ///< the tensor [experts, ...] is the stack
};

/// A module of an adapter that changes a tensor.
struct Edit {
  const AdapterFile* adapter = nullptr;
  std::string module;
  double weight = 1.0;
  std::optional<ExpertEdit> experts = {};
  /// Of a tensor that is a stack, for one of its matrices.
  FoldTerm term(const std::vector<int64_t>& shape, int64_t expert = 0) const;
};

/// A tensor that is written.
struct MergeOutput {
  io::TensorSpec spec;
  const io::TensorInfo* source = nullptr;  ///< of the base
  const io::TensorInfo* whole = nullptr;   ///< of an adapter, in place of the base's
  std::vector<Edit> edits;                 ///< in order
  bool transposed = false;                 ///< the edits' matrix is stored as [in, out]
  bool bias = false;                       ///< the edits are those of the module's bias
  bool alone = false;                      ///< one of the edits sets norms, and suffers no other
  bool rescaled = false;                   ///< the only edit sets scales
  bool new_zeros = false;                  ///< and zero points
  bool grouped = false;                    ///< what edits add is constant in groups of columns
  bool additive = true;                    ///< edits only add
  bool changed() const { return whole != nullptr || !edits.empty() || !rows.empty(); }
  /// New rows of a table: their ids, and the tensor of an adapter that holds them.
  std::vector<std::pair<std::vector<int64_t>, const io::TensorInfo*>> rows;
};

/// What is read, changed and written.
struct MergePlan {
  explicit MergePlan(const MergeFilesOptions& options);

  std::unique_ptr<MergeBase> base;
  /// What an adapter was trained on, when it is folded into the model that was quantised.
  std::unique_ptr<MergeBase> trained;
  BaseLayout layout;
  std::vector<std::unique_ptr<AdapterFile>> adapters;
  std::vector<MergeOutput> outputs;
  std::vector<std::string> warnings;
  bool unties = false;     ///< the head of a tied model gets a tensor of its own
  int64_t vocabulary = 0;  ///< rows of the token table, when an adapter brings others; else 0

 private:
  MergeOutput* output_of(const std::string& name);
  void add(const AdapterFile& adapter, double weight);
  void add_stacks(const AdapterFile& adapter, double weight);
  void add_stack(const AdapterFile& adapter, double weight, const std::string& parameter,
                 std::shared_ptr<const AdapterFile::Stack> stack);
  bool holds(const std::string& parameter, const AdapterFile::Stack& stack, int64_t experts);
  void add_whole(const AdapterFile& adapter, double weight);
  void add_token_rows(const AdapterFile& adapter);
  void check_targets(const AdapterFile& adapter);
  void check_base(const AdapterFile& adapter, bool force);
  WeightSample sample_of(const WeightSample& like);
  void keep_tied_head();
  void check_vocabulary() const;
  bool is_resized(const MergeOutput& output, const io::TensorInfo& tensor) const;
  void open_trained(const MergeFilesOptions& options);
  std::string dtype_;  // as asked for
  std::vector<std::string> faults_;
};

}  // namespace budwood
