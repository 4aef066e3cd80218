#include <ATen/ATen.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <budwood/peft/kernels/cross_entropy.h>
#include <budwood/peft/ops/cross_entropy.h>
#include <budwood/peft/ops/dispatch.h>
#include <budwood/quant/error.h>
#include <budwood/quant/tensors.h>

namespace budwood::ops {
namespace {

using Project = std::function<at::Tensor(const at::Tensor&)>;
using OptionalTensor = std::optional<at::Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Two = std::tuple<at::Tensor, at::Tensor>;

at::Tensor part_of(const at::Tensor& t, int64_t begin, int64_t count) {
  return t.defined() ? t.narrow(0, begin, count) : t;
}

LossOptions of_rows(const LossOptions& options, int64_t begin, int64_t count) {
  auto own = options;
  own.weights = part_of(options.weights, begin, count);
  return own;
}

// The formula with ATen: other devices, and float64.
Two sum_with_aten(const at::Tensor& logits, const at::Tensor& labels, const LossOptions& options,
                  bool gradient) {
  const auto x = logits.scalar_type() == at::kDouble ? logits : logits.to(at::kFloat);
  const double e = options.label_smoothing, z = options.z_loss;
  const auto lse = x.logsumexp(1);
  const auto at_label = x.gather(1, labels.unsqueeze(1)).squeeze(1);
  auto losses = (1 - e) * (lse - at_label) + e * (lse - x.mean(1)) + z * lse.square();
  const auto w = options.weights.defined() ? options.weights.to(x.options())
                                           : at::ones({labels.size(0)}, x.options());
  losses = losses * w;
  if (!gradient) return {losses.sum(), at::empty({0}, logits.options())};
  auto grad = at::softmax(x, 1) * (1 + 2 * z * lse).unsqueeze(1);
  grad = grad - e / static_cast<double>(x.size(1));
  grad.scatter_add_(1, labels.unsqueeze(1), at::full_like(at_label, e - 1).unsqueeze(1));
  return {losses.sum(), (grad * w.unsqueeze(1)).to(logits.scalar_type())};
}

// Calls use(first row, count) for each chunk.
template <class Use>
void for_chunks(int64_t rows, int64_t chunk, const Use& use) {
  for (int64_t begin = 0; begin < rows; begin += chunk) use(begin, std::min(chunk, rows - begin));
}

class CrossEntropyFunction : public torch::autograd::Function<CrossEntropyFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& logits,
                            const at::Tensor& labels, const LossOptions& options) {
    auto [sum, gradient] =
        cross_entropy_sum(logits.detach().clone(), labels, options, /*gradient=*/true);
    ctx->save_for_backward({gradient});
    return sum;
  }
  static variable_list backward(AutogradContext* ctx, variable_list incoming) {
    const auto gradient = ctx->get_saved_variables()[0];
    return {gradient * incoming[0].to(gradient.scalar_type()), {}, {}};
  }
};

// Gradients of a sum scale with the incoming scalar: the forward takes them for a scalar of 1,
// chunk by chunk, and keeps only those of hidden and of the parameters.
class AnyHeadFunction : public torch::autograd::Function<AnyHeadFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden,
                            at::TensorList parameters, const at::Tensor& labels,
                            const Project& project, const LossOptions& options) {
    auto total = at::zeros({}, hidden.options().dtype(at::kDouble));
    variable_list grads{at::empty_like(hidden)};
    for (const auto& p : parameters) grads.push_back(at::zeros_like(p));
    for_chunks(hidden.size(0), options.chunk, [&](int64_t begin, int64_t count) {
      auto rows = hidden.detach().narrow(0, begin, count).requires_grad_();
      at::Tensor loss;
      {
        at::AutoGradMode on(true);
        loss = CrossEntropyFunction::apply(project(rows), labels.narrow(0, begin, count),
                                           of_rows(options, begin, count));
      }
      variable_list inputs{rows};
      inputs.insert(inputs.end(), parameters.begin(), parameters.end());
      const auto part = torch::autograd::grad({loss}, inputs);
      grads[0].narrow(0, begin, count).copy_(part[0]);
      for (size_t i = 1; i < part.size(); ++i) grads[i].add_(part[i]);
      total += loss.detach().to(at::kDouble);
    });
    ctx->save_for_backward(std::move(grads));
    return total.to(at::kFloat);
  }

  static variable_list backward(AutogradContext* ctx, variable_list incoming) {
    auto grads = ctx->get_saved_variables();
    for (auto& grad : grads) grad = grad * incoming[0].to(grad.scalar_type());
    grads.resize(grads.size() + 3);  // labels, project, options
    return grads;
  }
};

at::Tensor without_gradient_of(const at::Tensor& hidden, const at::Tensor& labels,
                               const Project& project, const LossOptions& options) {
  auto total = at::zeros({}, hidden.options().dtype(at::kDouble));
  for_chunks(hidden.size(0), options.chunk, [&](int64_t begin, int64_t count) {
    const auto logits = project(hidden.narrow(0, begin, count));
    total += std::get<0>(cross_entropy_sum(logits, labels.narrow(0, begin, count),
                                           of_rows(options, begin, count), false));
  });
  return total.to(at::kFloat);
}

void check(const at::Tensor& hidden, const at::Tensor& labels, const LossOptions& o) {
  const auto refuse = [](const std::string& fact) { throw Error("linear_cross_entropy", fact); };
  if (hidden.dim() != 2 || labels.dim() != 1 || labels.size(0) != hidden.size(0))
    refuse(
        fmt::format("hidden is [tokens, d] and labels [tokens]; found {} dimensions with {} "
                    "rows and {} labels",
                    hidden.dim(), hidden.size(0), labels.numel()));
  if (o.weights.defined() && (o.weights.dim() != 1 || o.weights.size(0) != labels.size(0)))
    refuse(fmt::format("there is one weight for each of {} labels, found {}", labels.size(0),
                       o.weights.numel()));
  if (o.label_smoothing < 0 || o.label_smoothing >= 1 || o.z_loss < 0 || o.chunk < 1)
    refuse(
        fmt::format("label_smoothing is in [0, 1), z_loss at least 0 and chunk at least 1; "
                    "found {}, {} and {}",
                    o.label_smoothing, o.z_loss, o.chunk));
}

// The counted rows of everything.
struct Counted {
  at::Tensor hidden, labels;
  LossOptions options;
};
Counted counted(const at::Tensor& hidden, const at::Tensor& labels, const LossOptions& options) {
  const auto kept = labels.ge(0).nonzero().squeeze(1);
  if (kept.numel() == labels.numel()) return {hidden, labels, options};
  auto own = options;
  if (own.weights.defined()) own.weights = own.weights.index_select(0, kept);
  return {hidden.index_select(0, kept), labels.index_select(0, kept), own};
}

// ---- a frozen head

LossOptions options_of(const OptionalTensor& weights, double smoothing, double z_loss,
                       int64_t chunk) {
  return {smoothing, z_loss, weights.value_or(at::Tensor()), chunk};
}

Two frozen_forward(const at::Tensor& hidden, at::TensorList weight, int64_t format,
                   at::IntArrayRef shape, const at::Tensor& labels, const OptionalTensor& weights,
                   double smoothing, double z_loss, int64_t chunk, bool gradient) {
  const auto options = options_of(weights, smoothing, z_loss, chunk);
  check(hidden, labels, options);
  const auto head = quant::Weight::from_parts(weight.vec(), format, shape[0], shape[1]);
  const auto rows = counted(hidden, labels, options);
  auto total = at::zeros({}, hidden.options().dtype(at::kDouble));
  auto grads = at::empty(gradient ? rows.hidden.sizes() : at::IntArrayRef{0}, hidden.options());
  for_chunks(rows.hidden.size(0), chunk, [&](int64_t begin, int64_t count) {
    const auto target = rows.labels.narrow(0, begin, count);
    auto [sum, slope] = cross_entropy_sum(head.linear(rows.hidden.narrow(0, begin, count)), target,
                                          of_rows(rows.options, begin, count), gradient);
    total += sum;
    if (gradient) grads.narrow(0, begin, count).copy_(head.backward_input(slope));
  });
  if (gradient && rows.labels.numel() != labels.numel()) {
    auto all = at::zeros(hidden.sizes(), hidden.options());
    all.index_copy_(0, labels.ge(0).nonzero().squeeze(1), grads);
    grads = all;
  }
  return {total.to(at::kFloat), grads};
}

using Forward = Two(const at::Tensor&, at::TensorList, int64_t, c10::SymIntArrayRef,
                    const at::Tensor&, const OptionalTensor&, double, double, int64_t, bool);
Two call_forward(const at::Tensor& hidden, at::TensorList weight, int64_t format,
                 c10::SymIntArrayRef shape, const at::Tensor& labels, const OptionalTensor& weights,
                 double smoothing, double z_loss, int64_t chunk, bool gradient) {
  static const Operator<Forward> op("budwood::linear_cross_entropy_forward");
  return op(hidden, weight, format, shape, labels, weights, smoothing, z_loss, chunk, gradient);
}

class FrozenHeadFunction : public torch::autograd::Function<FrozenHeadFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden, at::TensorList weight,
                            int64_t format, c10::SymIntArrayRef shape, const at::Tensor& labels,
                            const OptionalTensor& weights, double smoothing, double z_loss,
                            int64_t chunk) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, gradient] = call_forward(hidden, weight, format, shape, labels, weights, smoothing,
                                         z_loss, chunk, /*gradient=*/hidden.requires_grad());
    ctx->saved_data["inputs"] = static_cast<int64_t>(weight.size()) + 8;
    ctx->save_for_backward({gradient});
    return loss;
  }
  static variable_list backward(AutogradContext* ctx, variable_list incoming) {
    const auto gradient = ctx->get_saved_variables()[0];
    variable_list grads(static_cast<size_t>(ctx->saved_data["inputs"].toInt()));
    grads[0] = gradient * incoming[0].to(gradient.scalar_type());
    return grads;
  }
};

at::Tensor frozen_entry(const at::Tensor& hidden, at::TensorList weight, int64_t format,
                        c10::SymIntArrayRef shape, const at::Tensor& labels,
                        const OptionalTensor& weights, double smoothing, double z_loss,
                        int64_t chunk) {
  return std::get<0>(call_forward(hidden, weight, format, shape, labels, weights, smoothing, z_loss,
                                  chunk, /*gradient=*/false));
}

at::Tensor frozen_autograd(const at::Tensor& hidden, at::TensorList weight, int64_t format,
                           c10::SymIntArrayRef shape, const at::Tensor& labels,
                           const OptionalTensor& weights, double smoothing, double z_loss,
                           int64_t chunk) {
  for (const auto& part : weight)
    if (part.requires_grad())
      throw Error("linear_cross_entropy", "the head is frozen, but its weight requires grad");
  return FrozenHeadFunction::apply(hidden, weight, format, shape, labels, weights, smoothing,
                                   z_loss, chunk);
}

Two frozen_meta(const at::Tensor& hidden, at::TensorList, int64_t, c10::SymIntArrayRef,
                const at::Tensor&, const OptionalTensor&, double, double, int64_t, bool gradient) {
  return {at::empty({}, hidden.options().dtype(at::kFloat)),
          gradient ? at::empty_symint(hidden.sym_sizes(), hidden.options())
                   : at::empty({0}, hidden.options())};
}

}  // namespace

Two cross_entropy_sum(at::Tensor logits, const at::Tensor& labels, const LossOptions& options,
                      bool gradient) {
  const int64_t classes = logits.size(1);
  const int64_t most = labels.numel() == 0 ? 0 : labels.max().item<int64_t>();
  if (most >= classes)
    throw Error("linear_cross_entropy",
                fmt::format("labels are below the number of classes, {}; found {}", classes, most));
  if (!quant::kernels_take(logits)) return sum_with_aten(logits, labels, options, gradient);
  if (!logits.is_contiguous()) logits = logits.contiguous();
  const auto target = labels.to(at::kLong).contiguous();
  at::Tensor weights;
  kernels::CrossEntropyOptions own{.label_smoothing = static_cast<float>(options.label_smoothing),
                                   .z_loss = static_cast<float>(options.z_loss),
                                   .gradient = gradient};
  if (options.weights.defined()) {
    weights = options.weights.to(at::kFloat).contiguous();
    own.weights = weights.const_data_ptr<float>();
  }
  auto losses = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
  void* data = gradient ? logits.mutable_data_ptr() : const_cast<void*>(logits.const_data_ptr());
  kernels::cross_entropy({data, quant::float_type(logits.scalar_type()), classes}, logits.size(0),
                         classes, target.const_data_ptr<int64_t>(), own,
                         losses.mutable_data_ptr<float>(), quant::torch_threads());
  return {losses.sum(at::kDouble), gradient ? logits : at::empty({0}, logits.options())};
}

at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& labels,
                                const quant::Weight& head, const LossOptions& options) {
  static const Operator<at::Tensor(const at::Tensor&, at::TensorList, int64_t, c10::SymIntArrayRef,
                                   const at::Tensor&, const OptionalTensor&, double, double,
                                   int64_t)>
      op("budwood::linear_cross_entropy");
  const std::array<c10::SymInt, 2> shape{head.out, head.in};
  const auto weights = options.weights.defined() ? OptionalTensor(options.weights) : std::nullopt;
  return op(hidden, head.parts, static_cast<int64_t>(head.format), shape, labels, weights,
            options.label_smoothing, options.z_loss, options.chunk);
}

at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& labels,
                                const Project& project, const std::vector<at::Tensor>& parameters,
                                const LossOptions& options) {
  check(hidden, labels, options);
  bool differentiate = hidden.requires_grad();
  for (const auto& p : parameters) differentiate = differentiate || p.requires_grad();
  differentiate = differentiate && at::GradMode::is_enabled();

  const auto rows = counted(hidden, labels, options);
  if (rows.labels.numel() == 0) return hidden.sum().to(at::kFloat) * 0;
  return differentiate ? AnyHeadFunction::apply(rows.hidden, at::TensorList(parameters),
                                                rows.labels, project, rows.options)
                       : without_gradient_of(rows.hidden, rows.labels, project, rows.options);
}

#define BUDWOOD_LOSS_ARGUMENTS                                                  \
  "Tensor hidden, Tensor[] weight, int format, SymInt[] shape, Tensor labels, " \
  "Tensor? weights=None, float label_smoothing=0.0, float z_loss=0.0, int chunk=128"
TORCH_LIBRARY_FRAGMENT(budwood, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("linear_cross_entropy(" BUDWOOD_LOSS_ARGUMENTS ") -> Tensor", tags);
  m.def("linear_cross_entropy_forward(" BUDWOOD_LOSS_ARGUMENTS
        ", bool gradient=False) -> (Tensor, Tensor)",
        tags);
  implement(m, "linear_cross_entropy", frozen_entry);
  implement(m, "linear_cross_entropy_forward", frozen_forward);
  without_gradient(m, "linear_cross_entropy_forward");
  m.impl("linear_cross_entropy", c10::DispatchKey::Autograd, frozen_autograd);
  m.impl("linear_cross_entropy", c10::DispatchKey::Meta, frozen_entry);
  m.impl("linear_cross_entropy_forward", c10::DispatchKey::Meta, frozen_meta);
}
#undef BUDWOOD_LOSS_ARGUMENTS

}  // namespace budwood::ops
