#pragma once

#include <budwood/peft/io/hf_index.h>
#include <budwood/peft/targets.h>

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace budwood {

/// What the files of a model say about its modules, without the model.
class BaseLayout {
 public:
  BaseLayout(const std::filesystem::path& folder, const io::ModelFiles& files);

  /// config.json's text, empty when there is none.
  const std::string& config() const { return config_; }
  const std::string& model_type() const { return model_type_; }
  /// Whether config.json names a class of causal models with a head.
  bool causal() const { return causal_; }
  /// Whether the weights are packed by some quantiser.
  bool quantised() const { return quantised_; }

  /// The tensor that a class of transformers calls `name`: files of a body alone lack the prefix
  /// that the class adds, and the reverse. Null when there is none.
  const io::TensorInfo* find(const std::string& name) const;
  /// The tensor of the token table that a tied head reads; null when the head has its own or the
  /// model has none.
  const io::TensorInfo* tied_table() const { return tied_; }
  /// Whether a module holds its matrix as [in, out].
  bool stores_transposed(const std::string& module) const;
  /// Modules with a matrix, by the names that transformers' class gives them.
  std::vector<ModuleInfo> modules() const;

 private:
  const io::ModelFiles& files_;
  std::string config_, model_type_;
  bool quantised_ = false, causal_ = false;
  const io::TensorInfo* tied_ = nullptr;
};

}  // namespace budwood
