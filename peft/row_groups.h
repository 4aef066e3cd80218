#pragma once

#include <torch/nn/module.h>

#include <memory>
#include <string>
#include <vector>

/// A batch whose rows use different adapters: each slot computes group by group, so every row goes
/// through the model once.
namespace budwood {

/// Rows that use one adapter.
struct RowGroup {
  std::string adapter;  ///< empty = the bare base
  at::Tensor rows;      ///< int64 [n]: rows of what slots read
};
using RowGroups = std::vector<RowGroup>;

/// names[s] is the adapter of sequence s, whose rows are [cu[s], cu[s + 1]). Throws Error when
/// there are not as many names as sequences.
RowGroups row_groups(const std::vector<int64_t>& cu, const std::vector<std::string>& names);

/// For the length of a scope, which has to hold a backward too when blocks are checkpointed, rows
/// use the adapter of their group, whatever is active. Throws Error for an adapter that is not
/// attached or that is not a matter of rows (prefixes, prompts and what reads whole sequences), and
/// while something is merged.
class UseAdapters {
 public:
  UseAdapters(torch::nn::Module& model, RowGroups groups);
  ~UseAdapters();
  UseAdapters(const UseAdapters&) = delete;
  UseAdapters& operator=(const UseAdapters&) = delete;

 private:
  torch::nn::Module& model_;
};

}  // namespace budwood
