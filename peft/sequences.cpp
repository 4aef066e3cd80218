#include <ATen/ATen.h>

#include <budwood/peft/sequences.h>

namespace budwood {

at::Tensor sequence_means(const at::Tensor& values, const Sequences& sequences) {
  const size_t count = sequences.cu.size() - 1;
  const bool padded = sequences.tokens.size() == count;
  const int64_t n = values.size(-1);
  if (values.dim() > 2 && !padded) return values.mean(-2);
  const auto rows = values.reshape({-1, n});
  std::vector<at::Tensor> means;
  for (size_t s = 0; s < count; ++s) {
    const int64_t first = sequences.cu[s] + (padded ? sequences.padding[s] : 0);
    const int64_t tokens = padded ? sequences.tokens[s] : sequences.cu[s + 1] - sequences.cu[s];
    means.push_back(tokens > 0 ? rows.narrow(0, first, tokens).mean(0)
                               : at::zeros({n}, values.options()));
  }
  return means.empty() ? rows.narrow(0, 0, 0) : at::stack(means);
}

}  // namespace budwood
