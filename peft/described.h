#pragma once

#include <string>

namespace budwood {

/// What a model says of itself to inject(). A model that does not has no default targets.
class Described {
 public:
  virtual ~Described() = default;
  /// config.json's model_type: "llama".
  virtual std::string model_type() const = 0;
  /// Path of the projection to the vocabulary, which "all-linear" leaves out; empty = none.
  virtual std::string output_embedding() const = 0;
};

}  // namespace budwood
