#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <budwood/peft/ops/factors.h>
#include <budwood/peft/ops/gain.h>
#include <budwood/peft/ops/gated.h>
#include <budwood/peft/ops/kept.h>
#include <budwood/peft/ops/norm.h>
#include <budwood/peft/ops/projections.h>

namespace budwood::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Tensors = std::vector<at::Tensor>;

class Plain final : public Reading {
 public:
  at::Tensor value(const Tensors& inputs) const override { return inputs[0]; }
  Tensors backward(const Tensors&, const at::Tensor& grad,
                   const std::vector<bool>&) const override {
    return {grad};
  }
};

class RmsNormed final : public Reading {
 public:
  explicit RmsNormed(double eps) : eps_(eps) {}
  at::Tensor value(const Tensors& inputs) const override {
    return ops::rms_norm(inputs[0], inputs[1], eps_);
  }
  Tensors backward(const Tensors& inputs, const at::Tensor& grad,
                   const std::vector<bool>& needed) const override {
    auto [dx, dweight] = rms_norm_backward(grad, inputs[0], inputs[1], eps_, needed[1]);
    return {dx, needed[1] ? dweight : at::Tensor()};
  }

 private:
  double eps_;
};

class LayerNormed final : public Reading {
 public:
  explicit LayerNormed(double eps) : eps_(eps) {}
  at::Tensor value(const Tensors& inputs) const override {
    return ops::layer_norm(inputs[0], inputs[1], inputs[2], eps_);
  }
  Tensors backward(const Tensors& inputs, const at::Tensor& grad,
                   const std::vector<bool>& needed) const override {
    const bool both = needed[1] || needed[2];
    auto [dx, dweight, dbias] = layer_norm_backward(grad, inputs[0], inputs[1], eps_, both);
    return {dx, both ? dweight : at::Tensor(), both ? dbias : at::Tensor()};
  }

 private:
  double eps_;
};

class Gated final : public Reading {
 public:
  explicit Gated(kernels::Gate kind) : kind_(kind) {}
  at::Tensor value(const Tensors& inputs) const override {
    return ops::gated(kind_, inputs[0], inputs[1]);
  }
  Tensors backward(const Tensors& inputs, const at::Tensor& grad,
                   const std::vector<bool>&) const override {
    auto [dg, du] = gated_backward(kind_, grad, inputs[0], inputs[1]);
    return {dg, du};
  }

 private:
  kernels::Gate kind_;
};

class Gelu final : public Reading {
 public:
  explicit Gelu(std::string approximate) : approximate_(std::move(approximate)) {}
  at::Tensor value(const Tensors& inputs) const override {
    return at::gelu(inputs[0], approximate_);
  }
  Tensors backward(const Tensors& inputs, const at::Tensor& grad,
                   const std::vector<bool>&) const override {
    return {at::gelu_backward(grad, inputs[0], approximate_)};
  }

 private:
  std::string approximate_;
};

// What the backward needs beside tensors.
struct Plan : torch::CustomClassHolder {
  std::shared_ptr<const Reading> reading;
  std::vector<Projection> projections;  // their other tensors stay with autograd
  size_t inputs = 0, biases = 0, terms = 0, gains = 0;
  std::vector<int64_t> ranks;  // 0 = no low-rank term
  std::vector<bool> has_bias, has_gain;
  at::ScalarType type = at::kFloat;  // of what is read
};

void check(const at::Tensor& x, const Projection& p) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == p.weight.in, "[project] the input's last dimension is ",
              p.weight.in, ", found ", x.sizes());
  for (const auto& part : p.weight.parts)
    TORCH_CHECK(!part.requires_grad(), "[project] the base weight is frozen, but requires grad");
  TORCH_CHECK(!p.gain.defined() || (p.gain.dim() == 1 && p.gain.size(0) == p.weight.out),
              "[project] a gain is [", p.weight.out, "], found ", p.gain.sizes());
  if (!p.a.defined()) return;
  TORCH_CHECK(p.a.dim() == 2 && p.a.size(1) == p.weight.in && p.b.dim() == 2 &&
                  p.b.size(0) == p.weight.out && p.b.size(1) == p.a.size(0),
              "[project] A is [r, ", p.weight.in, "] and B [", p.weight.out, ", r], found ",
              p.a.sizes(), " and ", p.b.sizes());
}

// x Aᵀ of all low-rank terms, side by side.
at::Tensor times_all_a(const at::Tensor& x, const std::vector<Projection>& projections) {
  Tensors a;
  for (const auto& p : projections)
    if (p.a.defined()) a.push_back(p.a);
  if (a.empty()) return {};
  return times_factor(x, (a.size() == 1 ? a[0] : at::cat(a)).t().contiguous());
}

// The rows of B [out, r] times the gain, where there is one.
at::Tensor with_gain(const at::Tensor& b, const at::Tensor& gain) {
  return gain.defined() ? b * gain.to(b.scalar_type()).unsqueeze(1) : b;
}

int64_t rank(const Projection& p) {
  return p.a.defined() ? p.a.size(0) : 0;
}

class ProjectFunction : public torch::autograd::Function<ProjectFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, at::TensorList biases,
                               at::TensorList a, at::TensorList b, at::TensorList gains,
                               const c10::intrusive_ptr<Plan>& plan) {
    const auto x = plan->reading->value(inputs.vec());
    const auto rows = flat(x);
    const auto u = times_all_a(rows, plan->projections);
    variable_list results, gained;
    int64_t at = 0;
    for (const auto& p : plan->projections) {
      check(x, p);
      quant::Terms terms{.gain = p.gain};
      // A gain is divided by its own result in the backward, which has no bias in it then.
      const bool late_bias = p.bias.defined() && p.gain.defined() && p.gain.requires_grad();
      if (p.bias.defined() && !late_bias) terms.bias = p.bias;
      if (p.a.defined()) {
        terms.left = u.narrow(1, at, rank(p));
        terms.right = with_gain(p.b, p.gain).t();
        terms.scale = p.scaling;
        at += rank(p);
      }
      auto y = p.weight.linear(x, terms);
      if (p.gain.defined()) gained.push_back(p.gain.requires_grad() ? y : at::Tensor());
      results.push_back(late_bias ? y + p.bias.to(y.scalar_type()) : y);
    }
    // Autograd holds what may change; the plan keeps weights and numbers.
    auto kept = c10::make_intrusive<Plan>();
    kept->reading = plan->reading;
    kept->type = x.scalar_type();
    kept->inputs = inputs.size();
    kept->biases = biases.size();
    kept->terms = a.size();
    kept->gains = gains.size();
    for (const auto& p : plan->projections) {
      kept->projections.push_back({.weight = p.weight, .scaling = p.scaling});
      kept->ranks.push_back(rank(p));
      kept->has_bias.push_back(p.bias.defined());
      kept->has_gain.push_back(p.gain.defined());
    }
    ctx->saved_data["plan"] = c10::IValue::make_capsule(std::move(kept));
    variable_list saved;
    for (const auto& input : inputs) saved.push_back(keep(input));
    for (auto& result : gained) result = keep(result);
    for (const auto list : {a, b, gains, at::TensorList(gained)})
      saved.insert(saved.end(), list.begin(), list.end());
    saved.push_back(u);
    ctx->save_for_backward(std::move(saved));
    return results;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto capsule = ctx->saved_data["plan"].toCapsule();
    const auto& plan = static_cast<const Plan&>(*capsule);
    const auto saved = ctx->get_saved_variables();
    Tensors inputs(saved.begin(), saved.begin() + static_cast<int64_t>(plan.inputs));
    for (auto& input : inputs)
      if (input.dim() >= 2) input = restored(input, plan.type);
    const auto* a = saved.data() + plan.inputs;
    const auto* b = a + plan.terms;
    const auto* gains = b + plan.terms;
    const auto* gained = gains + plan.gains;
    const at::Tensor u = saved.back();
    // inputs, biases, A, B, gains, plan
    const size_t first_bias = plan.inputs, first_a = first_bias + plan.biases;
    const size_t first_b = first_a + plan.terms, first_gain = first_b + plan.terms;
    variable_list result(first_gain + plan.gains + 1);
    std::vector<bool> needed;
    for (size_t i = 0; i < plan.inputs; ++i) needed.push_back(ctx->needs_input_grad(i));
    const bool need_x = std::find(needed.begin(), needed.end(), true) != needed.end();

    at::Tensor dx, x;
    const auto read = [&] {
      if (!x.defined()) x = flat(plan.reading->value(inputs));
      return x;
    };
    const at::Tensor v = u.defined() ? at::zeros_like(u) : u;
    size_t term = 0, bias = 0, gain = 0;
    int64_t column = 0;
    for (size_t i = 0; i < plan.projections.size(); ++i) {
      const auto& p = plan.projections[i];
      const int64_t r = plan.ranks[i];
      const bool used = grads[i].defined();
      const auto dy = used ? flat(grads[i]) : at::Tensor();
      const auto g = plan.has_gain[i] ? gains[gain] : at::Tensor();
      const auto own = r > 0 ? u.narrow(1, column, r) : at::Tensor();
      quant::Terms terms{.gain = g, .onto = dx};
      if (r > 0 && used) {
        const auto factor = with_gain(b[term], g);
        auto slope = v.narrow(1, column, r);
        slope.copy_(times_factor(dy, factor).mul_(p.scaling));
        const auto db = factor_gradient(own, dy, p.scaling).t();
        result[first_b + term] = with_gain(db, g).contiguous();
        terms.left = slope;
        terms.right = a[term];
      }
      if (plan.has_gain[i] && used && gained[gain].defined())
        result[first_gain + gain] =
            gain_gradient(dy, flat(restored(gained[gain], plan.type)), g,
                          {p.weight, read, own, r > 0 ? b[term] : at::Tensor(), p.scaling});
      if (plan.has_bias[i] && used && ctx->needs_input_grad(first_bias + bias))
        result[first_bias + bias] = dy.sum(0);
      if (used && need_x) dx = p.weight.backward_input(dy, terms);
      term += r > 0;
      column += r;
      bias += plan.has_bias[i];
      gain += plan.has_gain[i];
    }
    if (plan.terms > 0) {
      const auto da = factor_gradient(v, read(), 1.0);
      int64_t row = 0;
      for (size_t i = 0; i < plan.terms; ++i) {
        result[first_a + i] = da.narrow(0, row, a[i].size(0));
        row += a[i].size(0);
      }
    }
    if (need_x && dx.defined()) {
      auto shape = inputs[0].sizes().vec();
      shape.back() = dx.size(-1);
      const auto own = plan.reading->backward(inputs, dx.view(shape), needed);
      for (size_t i = 0; i < own.size(); ++i)
        if (needed[i]) result[i] = own[i];
    }
    return result;
  }
};

}  // namespace

Source Source::plain(at::Tensor x) {
  static const auto reading = std::make_shared<const Plain>();
  return {reading, {std::move(x)}};
}

Source Source::rms_norm(at::Tensor x, at::Tensor weight, double eps) {
  return {std::make_shared<const RmsNormed>(eps), {std::move(x), std::move(weight)}};
}

Source Source::layer_norm(at::Tensor x, at::Tensor weight, at::Tensor bias, double eps) {
  return {std::make_shared<const LayerNormed>(eps),
          {std::move(x), std::move(weight), std::move(bias)}};
}

Source Source::gated(kernels::Gate kind, at::Tensor gate, at::Tensor up) {
  return {std::make_shared<const Gated>(kind), {std::move(gate), std::move(up)}};
}

Source Source::gelu(at::Tensor x, std::string approximate) {
  return {std::make_shared<const Gelu>(std::move(approximate)), {std::move(x)}};
}

Tensors project(const Source& source, const std::vector<Projection>& projections) {
  auto plan = c10::make_intrusive<Plan>();
  plan->reading = source.reading;
  plan->projections = projections;
  Tensors biases, a, b, gains;
  for (const auto& p : projections) {
    TORCH_CHECK(p.a.defined() == p.b.defined(), "[project] A and B come together");
    if (p.bias.defined()) biases.push_back(p.bias);
    if (p.gain.defined()) gains.push_back(p.gain);
    if (!p.a.defined()) continue;
    a.push_back(p.a);
    b.push_back(p.b);
  }
  return ProjectFunction::apply(at::TensorList(source.inputs), at::TensorList(biases),
                                at::TensorList(a), at::TensorList(b), at::TensorList(gains), plan);
}

}  // namespace budwood::ops
