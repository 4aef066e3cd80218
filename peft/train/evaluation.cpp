#include <budwood/peft/train/evaluation.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <chrono>
#include <cmath>

namespace budwood::train {
namespace {

constexpr int64_t kChunk = 128;  // positions whose logits exist at once

// Losses of the counted positions in order, fp64 on the host.
at::Tensor token_losses(models::CausalLM& model, const Batch& batch) {
  const auto [tokens, all_labels] = model.with_virtual_tokens(batch.tokens, batch.labels);
  const auto counted = all_labels.ge(0).nonzero().squeeze(1);
  const auto rows = model.hidden(tokens).index_select(0, counted);
  const auto labels = all_labels.index_select(0, counted);
  std::vector<at::Tensor> parts;
  for (int64_t begin = 0; begin < rows.size(0); begin += kChunk) {
    const int64_t n = std::min(kChunk, rows.size(0) - begin);
    const auto logits = model.logits(rows.narrow(0, begin, n)).to(at::kFloat);
    parts.push_back(
        at::cross_entropy_loss(logits, labels.narrow(0, begin, n), {}, at::Reduction::None));
  }
  return at::cat(parts).to(at::kDouble).cpu();
}

}  // namespace

ModeScope::ModeScope(torch::nn::Module& model, bool training)
    : model_(model), own_(model.is_training()) {
  for (auto& module : model.modules(/*include_self=*/false))
    modes_.emplace_back(module, module->is_training());
  model.train(training);
}

ModeScope::~ModeScope() {
  // train() reaches the children too; parents come before them here, so children have the last
  // word.
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

  // Loss and count of every sequence: the spread between sequences is what the error comes from.
  std::vector<std::pair<double, double>> sums;
  sampler.restore({0, 0});
  const int64_t wanted = batches > 0 ? std::min(batches, sampler.batches()) : sampler.batches();
  for (int64_t i = 0; i < wanted; ++i) {
    const auto batch = sampler.next();
    const auto losses = token_losses(model, to_device(batch, device));
    const auto* labels = batch.labels.const_data_ptr<int64_t>();
    const auto* loss = losses.const_data_ptr<double>();
    const auto& cu = batch.tokens.cu_seqlens;
    for (size_t s = 0; s + 1 < cu.size(); ++s) {
      double sum = 0.0, n = 0.0;
      for (int64_t t = cu[s]; t < cu[s + 1]; ++t)
        if (labels[t] >= 0) sum += *loss++, ++n;
      if (n > 0) sums.emplace_back(sum, n);
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
