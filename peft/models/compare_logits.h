#pragma once

#include <budwood/peft/merge.h>
#include <budwood/peft/models/registry.h>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace budwood::models {

/// A model with adapters attached and active, "adapter0" and so on, each at its weight. What their
/// folders had to say is added to `warnings`.
std::shared_ptr<CausalLM> load_adapted(const std::string& path,
                                       const std::vector<MergeSource>& adapters,
                                       const LoadOptions& options,
                                       std::vector<std::string>& warnings);

/// Logits of one text from a model with adapters and from the merged one, both computed in fp32.
struct LogitsComparison {
  int64_t tokens = 0;
  double difference = 0;  ///< the largest
  double size = 0;        ///< the largest magnitude of a logit
  double agreement = 0;   ///< part of the positions where the same token is the most likely
  double relative() const { return size > 0 ? difference / size : difference; }
};

/// `ids`: the text; when empty, `count` random tokens of the vocabulary, always the same ones. One
/// model after the other is in memory.
LogitsComparison compare_logits(const std::string& model, const std::vector<MergeSource>& adapters,
                                const std::string& merged, std::vector<int64_t> ids, int64_t count);

}  // namespace budwood::models
