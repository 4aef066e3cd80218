#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <budwood/peft/optim/fused_backward.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <cmath>
#include <unordered_set>

namespace budwood::optim {
namespace {

constexpr double kFirstScale = 4294967296.0;  // 2^32
constexpr int64_t kGoodSteps = 1000;

using Receiver = std::function<void(const at::Tensor&)>;

struct Hook final : torch::autograd::PostAccumulateGradHook {
  explicit Hook(Receiver receiver) : receive(std::move(receiver)) {}
  void operator()(const at::Tensor& p) override { receive(p); }
  Receiver receive;
};

}  // namespace

/// Takes part in every backward while it lives.
struct FusedBackward::Hooks {
  std::vector<at::Tensor> tensors;
  ~Hooks() {
    for (const auto& p : tensors) torch::autograd::impl::set_post_acc_grad_hooks(p, nullptr);
  }
  void add(const std::string& path, const at::Tensor& p, Receiver receiver) {
    if (torch::autograd::impl::post_acc_grad_hooks(p) != nullptr)
      throw Error("FusedBackward", fmt::format("{} has a hook after its gradient already: it is "
                                               "updated during another backward",
                                               path));
    torch::autograd::impl::set_post_acc_grad_hooks(p, std::make_unique<Hook>(std::move(receiver)));
    tensors.push_back(p);
  }
};

FusedBackward::FusedBackward(Optimizer& optimizer, FusedOptions options)
    : optimizer_(optimizer), options_(options), hooks_(std::make_unique<Hooks>()) {
  if (!(options_.clip_norm >= 0) || !(options_.clip_value >= 0))
    throw Error("FusedBackward", fmt::format("clip_norm and clip_value are at least 0, found {} "
                                             "and {}",
                                             options_.clip_norm, options_.clip_value));
  const auto& parameters = optimizer_.parameters();
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto& [path, p] = parameters[i];
    half_ = half_ || p.scalar_type() == at::kHalf;
    received_.push_back(false);
    hooks_->add(path, p, [this, i](const at::Tensor& tensor) { receive(i, tensor); });
  }
  if (half_) scale_ = kFirstScale;
}

FusedBackward::~FusedBackward() = default;

void FusedBackward::receive(size_t index, const at::Tensor& p) {
  const at::NoGradGuard no_grad;
  auto grad = p.grad();
  if (!running_ || !grad.defined()) return;
  p.mutable_grad() = at::Tensor();
  if (received_[index])
    throw Error("FusedBackward",
                fmt::format("the gradient of {} came in two pieces, as with re-entrant "
                            "checkpointing of a part of what uses it: take use_reentrant=False{}",
                            optimizer_.parameters()[index].first,
                            measuring_ ? "; nothing has changed" : ""));
  received_[index] = true;
  if (measuring_) {
    const auto norm = grad.norm(2, half_ ? at::kFloat : grad.scalar_type()).item<double>();
    sum_ += norm * norm;
    return;
  }
  if (factor_ != 1.0) grad = grad.to(half_ ? at::kFloat : grad.scalar_type()).mul_(factor_);
  if (options_.clip_value > 0) grad.clamp_(-options_.clip_value, options_.clip_value);
  const bool measured = options_.clip_norm > 0 || half_;
  if (!measured && !std::isfinite(grad.norm().item<double>()))
    throw Error("FusedBackward",
                fmt::format("the gradient of {} is not finite; {} tensors are updated already: go "
                            "back to what was saved. With clip_norm nothing would have changed",
                            optimizer_.parameters()[index].first, updated_));
  optimizer_.update(index, grad, rate_);
  ++updated_;
}

// One pass over the graph, which only a pass that measures keeps for the next.
void FusedBackward::run(const at::Tensor& loss, bool measuring) {
  updated_ = 0;
  received_.assign(optimizer_.parameters().size(), false);
  measuring_ = measuring;
  running_ = true;
  try {
    loss.backward({}, /*keep_graph=*/measuring);
  } catch (...) {
    running_ = false;
    throw;
  }
  running_ = false;
}

FusedBackward::Result FusedBackward::backward(const at::Tensor& loss, double rate) {
  if (loss.numel() != 1 || !loss.requires_grad())
    throw Error("FusedBackward", "the loss is one number with its graph");
  for (const auto& [path, p] : optimizer_.parameters())
    if (p.grad().defined())
      throw Error("FusedBackward",
                  fmt::format("{} has a gradient already: gradients are not accumulated, put all "
                              "losses of a step into one",
                              path));
  const auto scaled = half_ ? loss * scale_ : loss;
  rate_ = rate;
  factor_ = 1.0 / scale_;
  Result result;
  const bool two_passes = options_.clip_norm > 0 || half_;
  if (two_passes) {
    sum_ = 0;
    run(scaled, /*measuring=*/true);
    result.norm = std::sqrt(sum_) / scale_;
    if (!std::isfinite(result.norm)) {
      if (!half_ || scale_ <= 1.0)
        throw Error("FusedBackward", fmt::format("the norm of the gradient is {}; nothing has "
                                                 "changed",
                                                 result.norm));
      scale_ /= 2;
      good_steps_ = 0;
      result.skipped = true;
      return result;
    }
    if (options_.clip_norm > 0) factor_ *= std::min(1.0, options_.clip_norm / (result.norm + 1e-6));
  }
  run(scaled, /*measuring=*/false);
  result.updated = updated_;
  if (half_ && ++good_steps_ % kGoodSteps == 0) scale_ *= 2;
  return result;
}

NamedTensors FusedBackward::state() const {
  if (!half_) return {};
  return {{"loss_scale", at::scalar_tensor(scale_, at::kDouble)},
          {"good_steps", at::scalar_tensor(good_steps_, at::kLong)}};
}

void FusedBackward::restore(const NamedTensors& state) {
  for (const auto& [name, tensor] : state) {
    if (name == "loss_scale") scale_ = tensor.item<double>();
    if (name == "good_steps") good_steps_ = tensor.item<int64_t>();
  }
}

}  // namespace budwood::optim
