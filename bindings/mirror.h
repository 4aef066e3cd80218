#pragma once

#include <torch/nn/module.h>

#include <budwood/peft/described.h>
#include <memory>
#include <string>

/// The slots of a Python model at the paths that the places have there, so that everything the
/// library does to a model it can do to these. Tensors are shared with the Python model.
class Mirror : public torch::nn::Module, public budwood::Described {
 public:
  Mirror(std::string model_type, std::string output_embedding)
      : model_type_(std::move(model_type)), output_embedding_(std::move(output_embedding)) {}

  std::string model_type() const override { return model_type_; }
  std::string output_embedding() const override { return output_embedding_; }

  /// Puts a slot at a path, with containers above it.
  void add(const std::string& path, const std::shared_ptr<torch::nn::Module>& slot);

 private:
  std::string model_type_, output_embedding_;
};
