#include <budwood/peft/models/running.h>

namespace budwood::models {

std::vector<Running> start_running(CausalLM& model,
                                   const std::vector<std::vector<int64_t>>& sequences,
                                   int64_t tokens) {
  std::vector<Running> all;
  std::vector<std::vector<int64_t>> together;
  int64_t held = 0;
  const auto flush = [&] {
    if (together.empty()) return;
    auto batch = TokenBatch::from_sequences(together);
    auto x = model.embed(batch);
    all.push_back({std::move(batch), std::move(x)});
    together.clear();
    held = 0;
  };
  for (const auto& sequence : sequences) {
    const auto n = static_cast<int64_t>(sequence.size());
    if (held + n > tokens) flush();
    together.push_back(sequence);
    held += n;
  }
  flush();
  return all;
}

}  // namespace budwood::models
