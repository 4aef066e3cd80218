#pragma once

#include <budwood/peft/models/model.h>

#include <functional>
#include <vector>

namespace budwood::models {

struct GenerateOptions {
  int64_t max_new_tokens = 128;
  /// 0 = greedy. Otherwise logits are divided by it and a token is drawn.
  double temperature = 0.0;
  int64_t top_k = 0;   ///< draw among the k most likely tokens; 0 = all
  double top_p = 1.0;  ///< draw among the fewest tokens that hold this probability
  double repetition_penalty =
      1.0;  ///< > 1 makes tokens that occurred less likely (arXiv 1909.05858)
  uint64_t seed = 0;
  /// Generation stops after one of these; empty = the model's own eos_token_id.
  std::vector<int64_t> eos_token_id;
  /// Called with each new token; false stops.
  std::function<bool(int64_t)> on_token;
};

/// Continues a prompt with a key/value cache. Returns the new tokens, the stopping one included.
std::vector<int64_t> generate(CausalLM& model, const std::vector<int64_t>& prompt,
                              const GenerateOptions& options = {});

/// One draw from logits [vocabulary] by the options' rules; generator-seeded draws repeat.
int64_t sample(const at::Tensor& logits, const GenerateOptions& options, at::Generator& generator);

}  // namespace budwood::models
