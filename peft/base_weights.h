#pragma once

#include <torch/nn/module.h>

#include <budwood/peft/base_fingerprint.h>
#include <budwood/quant/weight.h>
#include <cstdint>
#include <string>
#include <vector>

namespace budwood {

/// The frozen matrices of a model that are stored in one form.
struct BaseWeights {
  std::string form;      ///< "float32", "nf4", "GGUF Q4_1", ...
  int64_t matrices = 0;  ///< a matrix that two slots share counts once
  int64_t weights = 0;   ///< numbers that they stand for
  int64_t bytes = 0;     ///< that hold them, scales included
};

/// What the weights in a model's slots are, the largest share first.
std::vector<BaseWeights> base_weights(torch::nn::Module& model);

/// The numbers of a weight that an adapter on it remembers; `path` is that of its module.
WeightSample sample_weight(const std::string& path, const quant::Weight& weight);

}  // namespace budwood
