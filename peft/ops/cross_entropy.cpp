#include <ATen/ATen.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <budwood/peft/ops/cross_entropy.h>
#include <budwood/quant/error.h>

namespace budwood::ops {
namespace {

using Project = std::function<at::Tensor(const at::Tensor&)>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor chunk_loss(const at::Tensor& logits, const at::Tensor& target) {
  return at::cross_entropy_loss(logits.to(at::kFloat), target, {}, at::Reduction::Sum);
}

// Gradients of a sum scale with the incoming scalar: the forward takes them for a scalar of 1,
// chunk by chunk, and keeps only those of hidden and of the parameters.
class LinearCrossEntropy : public torch::autograd::Function<LinearCrossEntropy> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden,
                            at::TensorList parameters, const at::Tensor& labels,
                            const Project& project, int64_t chunk) {
    auto total = at::zeros({}, hidden.options().dtype(at::kDouble));
    variable_list grads{at::empty_like(hidden)};
    for (const auto& p : parameters) grads.push_back(at::zeros_like(p));
    for (int64_t begin = 0; begin < hidden.size(0); begin += chunk) {
      const int64_t count = std::min(chunk, hidden.size(0) - begin);
      auto rows = hidden.detach().narrow(0, begin, count).requires_grad_();
      at::Tensor loss;
      {
        at::AutoGradMode on(true);
        loss = chunk_loss(project(rows), labels.narrow(0, begin, count));
      }
      variable_list inputs{rows};
      inputs.insert(inputs.end(), parameters.begin(), parameters.end());
      const auto part = torch::autograd::grad({loss}, inputs);
      grads[0].narrow(0, begin, count).copy_(part[0]);
      for (size_t i = 1; i < part.size(); ++i) grads[i].add_(part[i]);
      total += loss.detach().to(at::kDouble);
    }
    ctx->save_for_backward(std::move(grads));
    return total.to(at::kFloat);
  }

  static variable_list backward(AutogradContext* ctx, variable_list incoming) {
    auto grads = ctx->get_saved_variables();
    for (auto& grad : grads) grad = grad * incoming[0].to(grad.scalar_type());
    grads.resize(grads.size() + 3);  // labels, project, chunk
    return grads;
  }
};

at::Tensor without_grad(const at::Tensor& hidden, const at::Tensor& labels, const Project& project,
                        int64_t chunk) {
  auto total = at::zeros({}, hidden.options().dtype(at::kDouble));
  for (int64_t begin = 0; begin < hidden.size(0); begin += chunk) {
    const int64_t count = std::min(chunk, hidden.size(0) - begin);
    total += chunk_loss(project(hidden.narrow(0, begin, count)), labels.narrow(0, begin, count));
  }
  return total.to(at::kFloat);
}

}  // namespace

at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& labels,
                                const Project& project, const std::vector<at::Tensor>& parameters,
                                int64_t chunk) {
  if (hidden.dim() != 2 || labels.dim() != 1 || labels.size(0) != hidden.size(0))
    throw Error(
        "linear_cross_entropy",
        fmt::format("hidden is [tokens, d] and labels [tokens]; found {} dimensions with {} "
                    "rows and {} labels",
                    hidden.dim(), hidden.size(0), labels.numel()));
  bool differentiate = hidden.requires_grad();
  for (const auto& p : parameters) differentiate = differentiate || p.requires_grad();
  differentiate = differentiate && at::GradMode::is_enabled();

  const auto counted = labels.ge(0).nonzero().squeeze(1);
  if (counted.numel() == 0) return hidden.sum().to(at::kFloat) * 0;
  const bool all = counted.numel() == labels.numel();
  const auto rows = all ? hidden : hidden.index_select(0, counted);
  const auto target = all ? labels : labels.index_select(0, counted);
  return differentiate
             ? LinearCrossEntropy::apply(rows, at::TensorList(parameters), target, project, chunk)
             : without_grad(rows, target, project, chunk);
}

}  // namespace budwood::ops
