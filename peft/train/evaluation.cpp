#include <budwood/peft/train/evaluation.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <budwood/peft/ops/cross_entropy.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <chrono>
#include <cmath>

namespace budwood::train {

ModeScope::ModeScope(torch::nn::Module& model, bool training)
    : model_(model), own_(model.is_training()) {
  for (auto& module : model.modules(/*include_self=*/false))
    modes_.emplace_back(module, module->is_training());
  model.train(training);
}

ModeScope::~ModeScope() {
  // train() reaches the children too; parents come before them here, so children have the last word.
  model_.train(own_);
  for (const auto& [module, training] : modes_)
    if (module->is_training() != training) module->train(training);
}

at::Device device_of(const torch::nn::Module& model) {
  for (const auto& p : model.parameters()) return p.device();
  return at::kCPU;
}

Batch to_device(Batch batch, at::Device device) {
  if (device.is_cpu()) return batch;
  batch.tokens.ids = batch.tokens.ids.to(device);
  batch.tokens.positions = batch.tokens.positions.to(device);
  batch.labels = batch.labels.to(device);
  return batch;
}

Evaluation evaluate(models::CausalLM& model, Sampler& sampler, int64_t batches) {
  at::NoGradGuard no_grad;
  const ModeScope mode(model, false);
  const auto begin = std::chrono::steady_clock::now();
  const auto position = sampler.state();
  const auto device = device_of(model);
  const auto project = [&](const at::Tensor& rows) { return model.logits(rows); };

  // Loss and count of every sequence: the spread between sequences is what the error comes from.
  std::vector<std::pair<double, double>> sums;
  sampler.restore({0, 0});
  const int64_t wanted = batches > 0 ? std::min(batches, sampler.batches()) : sampler.batches();
  for (int64_t i = 0; i < wanted; ++i) {
    const auto counts = sampler.next();
    const auto labels_host = counts.labels;
    const auto batch = to_device(counts, device);
    const auto hidden = model.hidden(batch.tokens);
    const auto& cu = batch.tokens.cu_seqlens;
    for (size_t s = 0; s + 1 < cu.size(); ++s) {
      const auto n = labels_host.slice(0, cu[s], cu[s + 1]).ge(0).sum().item<int64_t>();
      if (n == 0) continue;
      const auto sum = ops::linear_cross_entropy(hidden.slice(0, cu[s], cu[s + 1]),
                                                 batch.labels.slice(0, cu[s], cu[s + 1]), project);
      sums.emplace_back(sum.item<double>(), static_cast<double>(n));
    }
  }
  sampler.restore(position);

  Evaluation e;
  double total = 0.0, count = 0.0, squares = 0.0;
  for (const auto& [sum, n] : sums) total += sum, count += n;
  e.loss = total / count;
  for (const auto& [sum, n] : sums) squares += (sum - e.loss * n) * (sum - e.loss * n);
  const auto k = static_cast<double>(sums.size());
  e.loss_error = k > 1 ? std::sqrt(k / (k - 1) * squares) / count : std::nan("");
  e.perplexity = std::exp(e.loss);
  e.perplexity_error = e.perplexity * e.loss_error;
  e.tokens = static_cast<int64_t>(count);
  e.sequences = static_cast<int64_t>(sums.size());
  e.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (!std::isfinite(e.loss))
    throw Error("evaluate", fmt::format("the loss is {} over {} tokens", e.loss, e.tokens));
  return e;
}

}  // namespace budwood::train
