#pragma once

#include <budwood/peft/merge/merge_base.h>
#include <budwood/peft/targets.h>

#include <string>
#include <vector>

namespace budwood {

/// What the files of a model say about its modules, without the model.
class BaseLayout {
 public:
  explicit BaseLayout(const MergeBase& base);

  const std::string& model_type() const { return model_type_; }
  /// Whether config.json names a class of causal models with a head.
  bool causal() const { return causal_; }

  /// The tensor that a class of transformers calls `name`: files of a body alone lack the prefix
  /// that the class adds, and the reverse. Null when there is none.
  const io::TensorInfo* find(const std::string& name) const;
  /// The tensor of the token table that a tied head reads; null when the head has its own or the
  /// model has none.
  const io::TensorInfo* tied_table() const { return tied_; }
  /// Whether a tensor, by its name in the files, holds a row for each word.
  bool is_word_table(const std::string& name) const;
  /// Whether a module holds its matrix as [in, out].
  bool stores_transposed(const std::string& module) const;
  /// Modules with a matrix, by the names that transformers' class gives them.
  std::vector<ModuleInfo> modules() const;

 private:
  const MergeBase& base_;
  std::string model_type_;
  bool causal_ = false;
  const io::TensorInfo* tied_ = nullptr;
};

}  // namespace budwood
