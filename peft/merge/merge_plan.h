#pragma once

#include <budwood/peft/io/hf_index.h>
#include <budwood/peft/merge.h>
#include <budwood/peft/merge/adapter_file.h>
#include <budwood/peft/merge/base_layout.h>

#include <memory>
#include <string>
#include <vector>

namespace budwood {

/// A module of an adapter that changes a tensor.
struct Edit {
  const AdapterFile* adapter = nullptr;
  std::string module;
  double weight = 1.0;
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
  /// New rows of a table: their ids, and the tensor of an adapter that holds them.
  std::vector<std::pair<std::vector<int64_t>, const io::TensorInfo*>> rows;
};

/// What is read, changed and written.
struct MergePlan {
  explicit MergePlan(const MergeFilesOptions& options);

  io::ModelFiles base;
  BaseLayout layout;
  std::vector<std::unique_ptr<AdapterFile>> adapters;
  std::vector<MergeOutput> outputs;
  std::vector<std::string> warnings;
  bool unties = false;  ///< the head of a tied model gets a tensor of its own

 private:
  MergeOutput* output_of(const std::string& name);
  void add(const AdapterFile& adapter, double weight);
  void add_whole(const AdapterFile& adapter, double weight);
  void add_token_rows(const AdapterFile& adapter);
  void check_targets(const AdapterFile& adapter);
  void keep_tied_head();
  std::string dtype_;  // as asked for
  std::vector<std::string> faults_;
};

}  // namespace budwood
