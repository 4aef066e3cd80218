#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/peft/models/model.h>
#include <budwood/quant/weight.h>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace budwood::models {

/// One tensor of a model as a plain checkpoint holds it: a matrix of any form, or a vector.
struct StoredTensor {
  std::optional<quant::Weight> matrix;
  at::Tensor vector;
  bool projection = false;  ///< the matrix of a linear layer, not a token table
  bool transposed = false;  ///< checkpoints hold its transpose [in, out]

  std::vector<int64_t> shape() const;
  at::ScalarType dtype() const { return matrix ? matrix->dtype() : vector.scalar_type(); }
  bool packed() const { return projection && matrix->packed(); }
  /// Rows [begin, end) on the CPU; a vector is one row.
  at::Tensor rows(int64_t begin, int64_t end, at::ScalarType dtype) const;
  int64_t row_count() const { return !matrix ? 1 : transposed ? matrix->in : matrix->out; }
};

/// False when a merge has given the head of a tied model a weight of its own.
bool head_is_tied(CausalLM& model);

/// All tensors of a model under transformers' names, without a tied head. Throws, naming path and
/// adapter, when an adapter is attached that is not merged; `where` is the function in the error.
std::map<std::string, StoredTensor> stored_tensors(CausalLM& model, const std::string& where);

}  // namespace budwood::models
