#pragma once

#include <budwood/peft/merge/base_layout.h>

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <memory>
#include <string>

namespace budwood::models {

/// The projections of a model's files, one at a time: a folder, plain or quantised, or a GGUF file.
class OriginalWeights {
 public:
  explicit OriginalWeights(const std::filesystem::path& path);
  /// W [out, in] of the module at `path`, fp32. Throws Error when there is none.
  at::Tensor matrix(const std::string& path) const;

 private:
  std::unique_ptr<MergeBase> base_;
  BaseLayout layout_;
};

}  // namespace budwood::models
