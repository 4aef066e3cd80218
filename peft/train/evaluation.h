#pragma once

#include <budwood/peft/models/model.h>
#include <budwood/peft/train/sampler.h>
#include <cstdint>

namespace budwood::train {

/// Loss of a model on held-out data. Standard errors treat sequences, not tokens, as independent
/// (ratio estimator); NaN when there is only one.
struct Evaluation {
  double loss = 0.0;  ///< mean over counted tokens, in nats
  double loss_error = 0.0;
  double perplexity = 0.0;  ///< exp(loss)
  double perplexity_error = 0.0;
  int64_t tokens = 0;  ///< counted
  int64_t sequences = 0;
  double seconds = 0.0;
};

/// Evaluates the first `batches` batches of epoch 0 (0 = all of them), with dropout off and without
/// gradients. The position of the sampler and the modes of the model's modules come back as they
/// were.
Evaluation evaluate(models::CausalLM& model, Sampler& sampler, int64_t batches = 0);

/// The modes of all modules, restored at the end of a scope.
class ModeScope {
 public:
  ModeScope(torch::nn::Module& model, bool training);
  ~ModeScope();
  ModeScope(const ModeScope&) = delete;
  ModeScope& operator=(const ModeScope&) = delete;

 private:
  torch::nn::Module& model_;
  bool own_;
  std::vector<std::pair<std::shared_ptr<torch::nn::Module>, bool>> modes_;
};

/// The device of a model's parameters.
at::Device device_of(const torch::nn::Module& model);
/// A batch whose tensors are on a device.
Batch to_device(Batch batch, at::Device device);

}  // namespace budwood::train
