#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/method.h>
#include <budwood/peft/methods/bottleneck.h>
#include <budwood/peft/methods/bottleneck_config.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

namespace budwood {
namespace {

constexpr double kNormEps = 1e-5;

using Activation = at::Tensor (*)(const at::Tensor&);

const std::map<std::string, Activation>& activations() {
  static const std::map<std::string, Activation> table = {
      {"relu", [](const at::Tensor& x) { return at::relu(x); }},
      {"relu6", [](const at::Tensor& x) { return at::hardtanh(x, 0, 6); }},
      {"gelu", [](const at::Tensor& x) { return at::gelu(x, "none"); }},
      {"gelu_orig", [](const at::Tensor& x) { return at::gelu(x, "none"); }},
      {"gelu_new", [](const at::Tensor& x) { return at::gelu(x, "tanh"); }},
      {"quick_gelu", [](const at::Tensor& x) { return x * at::sigmoid(1.702 * x); }},
      {"silu", [](const at::Tensor& x) { return at::silu(x); }},
      {"swish", [](const at::Tensor& x) { return at::silu(x); }},
      {"tanh", [](const at::Tensor& x) { return at::tanh(x); }},
      {"sigmoid", [](const at::Tensor& x) { return at::sigmoid(x); }},
      {"elu", [](const at::Tensor& x) { return at::elu(x); }},
      {"leakyrelu", [](const at::Tensor& x) { return at::leaky_relu(x); }},
      {"mish", [](const at::Tensor& x) { return at::mish(x); }},
      {"softplus", [](const at::Tensor& x) { return at::softplus(x); }},
      {"linear", [](const at::Tensor& x) { return x; }},
  };
  return table;
}

at::Tensor truncated_normal(at::Tensor t, double deviation, at::Generator generator) {
  t.normal_(0.0, deviation, generator);
  const double bound = 2 * deviation;
  for (auto outside = t.abs().gt(bound); outside.any().item<bool>(); outside = t.abs().gt(bound))
    t = at::where(outside, at::empty_like(t).normal_(0.0, deviation, generator), t);
  return t;
}

// The mean over the tokens of each sequence of values [batch, n, 1] or [tokens, 1], one for each
// sequence or laid out like the values.
at::Tensor mean_by_sequence(const at::Tensor& values, const Sequences& sequences) {
  const auto means = sequence_means(values, sequences);
  if (values.dim() > 2) return means.unsqueeze(1);
  std::vector<at::Tensor> rows;
  for (size_t s = 0; s + 1 < sequences.cu.size(); ++s)
    rows.push_back(means.narrow(0, static_cast<int64_t>(s), 1)
                       .expand({sequences.cu[s + 1] - sequences.cu[s], values.size(1)}));
  return rows.empty() ? values : at::cat(rows);
}

// 1 / (1 - p) for sequences that keep the branch and 0 for the others.
at::Tensor sequence_mask(const at::Tensor& like, const Sequences& sequences, double p) {
  const auto draw = [&](int64_t n) {
    return at::rand({n, 1}, like.options()).ge(p).to(like.scalar_type()) / (1 - p);
  };
  if (like.dim() > 2) return draw(like.size(0)).view({like.size(0), 1, 1});
  std::vector<at::Tensor> parts;
  for (size_t s = 0; s + 1 < sequences.cu.size(); ++s)
    parts.push_back(draw(1).expand({sequences.cu[s + 1] - sequences.cu[s], 1}));
  return at::cat(parts);
}

}  // namespace

at::Tensor activate(const std::string& name, const at::Tensor& x) {
  return activations().at(name)(x);
}

at::Tensor AdapterProjection::operator()(const at::Tensor& x) const {
  if (weight.defined())
    return at::linear(x, weight, bias.defined() ? std::optional(bias) : std::nullopt);
  // y[t, b, o] = Σ_i Σ_a C_i[a, b] (x[t, a, :] S_i T_i)[o]
  const int64_t n = rule.size(0);
  auto sizes = x.sizes().vec();
  const auto rows = x.reshape({-1, n, x.size(-1) / n});
  auto mixed = at::einsum("iab,tap->tibp", {rule, rows});
  auto y = at::einsum("tibp,ipk->tibk", {mixed, left});
  y = right.defined() ? at::einsum("tibk,iko->tbo", {y, right}) : y.sum(1);
  sizes.back() = y.size(1) * y.size(2);
  y = y.reshape(sizes);
  return bias.defined() ? y + bias : y;
}

Bottleneck::Bottleneck(std::shared_ptr<const BottleneckConfig> config, int64_t layer,
                       int64_t hidden, std::shared_ptr<Shared> shared, bool first, uint64_t seed)
    : BlockAdapter(config),
      shared_(std::move(shared)),
      first_(first),
      width_(config->width(layer, hidden)),
      hidden_(hidden) {
  auto generator = stream(seed);
  down_ = projection("adapter_down", hidden, width_, generator);
  up_ = projection("adapter_up", width_, hidden, generator);
  if (const auto* kind = std::get_if<std::string>(&config->scaling))
    scaling_ = register_parameter("scaling", at::ones({*kind == "channel" ? hidden : 1}));
  if (config->use_gating) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(hidden));
    gate_weight_ = register_parameter(
        "gate_weight", at::empty({1, hidden}, at::kFloat).uniform_(-bound, bound, generator));
    gate_bias_ = register_parameter("gate_bias", at::zeros({1}));
  }
  const auto norm = [&](const char* name, at::Tensor& weight, at::Tensor& bias) {
    weight = register_parameter(fmt::format("{}_weight", name), at::ones({hidden}));
    bias = register_parameter(fmt::format("{}_bias", name), at::zeros({hidden}));
  };
  if (config->ln_before) norm("adapter_norm_before", before_weight_, before_bias_);
  if (config->ln_after) norm("adapter_norm_after", after_weight_, after_bias_);
  if (first_ && shared_->rule.defined() && config->learn_phm)
    register_parameter("phm_rule", shared_->rule);
  else if (first_ && shared_->rule.defined())
    register_buffer("phm_rule", shared_->rule);
}

const BottleneckConfig& Bottleneck::own() const {
  return static_cast<const BottleneckConfig&>(*config());
}

AdapterProjection Bottleneck::projection(const char* name, int64_t in, int64_t out,
                                         at::Generator generator) {
  const auto& c = own();
  const bool is_up = std::string(name) == "adapter_up";
  AdapterProjection p;
  const auto keep = [&](const char* what, at::Tensor value) {
    return register_parameter(fmt::format("{}_{}", name, what), value);
  };
  if (c.phm_layer) {
    const int64_t n = c.phm_dim;
    if (in % n != 0 || out % n != 0)
      throw Error("inject",
                  fmt::format("phm_dim is {}; it must divide the hidden size and the width "
                              "of the bottleneck, here {} and {}",
                              n, is_up ? out : in, is_up ? in : out));
    p.rule = shared_->rule.defined() ? shared_->rule : keep("phm_rule", [&] {
      return at::empty({n, n, n}, at::kFloat).normal_(0.0, 0.01, generator);
    }());
    const auto xavier = [&](int64_t rows, int64_t columns) {
      const double deviation = std::sqrt(2.0 / static_cast<double>(rows + columns));
      return at::empty({n, rows, columns}, at::kFloat).normal_(0.0, deviation, generator);
    };
    if (c.factorized_phm_W) {
      p.left = keep("W_left", xavier(in / n, c.phm_rank));
      p.right = keep("W_right", xavier(c.phm_rank, out / n));
    } else {
      p.left = keep("W", xavier(in / n, out / n));
    }
    auto& last = p.right.defined() ? p.right : p.left;
    if (is_up && c.init_weights == "identity") last.data().zero_();
    if (c.phm_bias) p.bias = keep("bias", at::zeros({out}));
    return p;
  }
  auto w = at::zeros({out, in}, at::kFloat);
  if (c.init_weights == "bert") {
    w.normal_(0.0, 0.02, generator);
  } else if (c.init_weights == "houlsby") {
    w = truncated_normal(w, 0.01, generator);
  } else if (!is_up) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(in));  // kaiming-uniform, a = √5
    w.uniform_(-bound, bound, generator);
  }
  p.weight = keep("weight", w);
  p.bias = keep("bias", at::zeros({out}));
  return p;
}

at::Tensor Bottleneck::bottleneck(const at::Tensor& z, const Sequences& sequences) const {
  const auto& c = own();
  auto input = z;
  if (before_weight_.defined())
    input = at::layer_norm(input, {hidden_}, before_weight_, before_bias_, kNormEps);
  auto f = up_(activate(c.non_linearity, down_(input)));
  f = scaling_.defined() ? f * scaling_ : f * std::get<double>(c.scaling);
  if (gate_weight_.defined()) {
    const auto gate = at::sigmoid(at::linear(z, gate_weight_, gate_bias_));
    f = f * mean_by_sequence(gate, sequences);
  }
  if (is_training() && c.dropout > 0) f = at::dropout(f, c.dropout, true);
  if (is_training() && c.stochastic_depth > 0)
    f = f * sequence_mask(f, sequences, c.stochastic_depth);
  return f;
}

at::Tensor Bottleneck::forward(at::Tensor h, const at::Tensor& x, const Norm& norm,
                               const Sequences& sequences) const {
  const auto& c = own();
  const auto wide = up_.bias.defined() ? up_.bias.scalar_type() : at::kFloat;
  const auto dtype = h.scalar_type();
  h = h.to(wide);
  const auto stream = x.to(wide);
  const auto after = [&](at::Tensor f, const at::Tensor& residual) {
    if (residual.defined() && c.adapter_residual_before_ln) f = f + residual;
    if (after_weight_.defined())
      f = at::layer_norm(f, {hidden_}, after_weight_, after_bias_, kNormEps);
    if (residual.defined() && !c.adapter_residual_before_ln) f = f + residual;
    return f;
  };
  at::Tensor result;
  if (c.is_parallel) {
    result = h + after(bottleneck(stream, sequences), {});
  } else {
    auto z = h;
    if (c.original_ln_before) {
      const auto sum = h + stream;
      z = norm ? norm(sum.to(dtype)).to(wide) : sum;
    }
    at::Tensor residual = z;
    if (const auto* flag = std::get_if<bool>(&c.residual_before_ln)) {
      if (*flag) residual = h;
    } else if (norm) {
      residual = h + stream;
    } else {
      residual = h;
    }
    result = after(bottleneck(z, sequences), residual);
  }
  // The block adds x and its norm; without original_ln_after it must not, so x is taken off here.
  if (!c.original_ln_after) {
    if (norm)
      throw Error("bottleneck",
                  "original_ln_after = false is not available in a model whose norms come after "
                  "the sub-layers");
    result = result - stream;
  }
  return result.to(dtype);
}

AdapterState Bottleneck::state() const {
  AdapterState all;
  const auto add = [&](const std::string& name, const at::Tensor& t) {
    if (t.defined()) all.emplace_back(name, t);
  };
  const auto add_projection = [&](const std::string& name, const AdapterProjection& p) {
    add(name + ".weight", p.weight);
    if (!shared_->rule.defined()) add(name + ".phm_rule", p.rule);
    add(name + (p.right.defined() ? ".W_left" : ".W"), p.left);
    add(name + ".W_right", p.right);
    add(name + (p.weight.defined() ? ".bias" : ".b"), p.bias);
  };
  add_projection(own().ln_before ? "adapter_down.1" : "adapter_down.0", down_);
  add_projection("adapter_up", up_);
  add("scaling", scaling_);
  add("gate.weight", gate_weight_);
  add("gate.bias", gate_bias_);
  add("adapter_norm_before.weight", before_weight_);
  add("adapter_norm_before.bias", before_bias_);
  add("adapter_norm_after.weight", after_weight_);
  add("adapter_norm_after.bias", after_bias_);
  return all;
}

AdapterState Bottleneck::shared_state() const {
  if (!first_ || !shared_->rule.defined()) return {};
  return {{"base_model.model.shared_parameters.phm_rule", shared_->rule}};
}

std::vector<at::Tensor> Bottleneck::read_elsewhere() const {
  if (!first_ || !shared_->rule.defined() || !own().learn_phm) return {};
  return {shared_->rule};
}

bool Bottleneck::starts_as_identity() const {
  const auto& init = own().init_weights;
  return (init == "identity" || init == "mam_adapter") && own().original_ln_after &&
         !std::holds_alternative<std::string>(own().residual_before_ln) && !own().ln_after;
}

namespace {

std::vector<Grafted> make(const std::shared_ptr<const AdapterConfig>& config,
                          const std::vector<Place>& places, uint64_t seed) {
  const auto own = own_config<BottleneckConfig>(config);
  const auto shared = std::make_shared<Bottleneck::Shared>();
  if (own->phm_layer && own->shared_phm_rule) {
    auto rule = at::empty({own->phm_dim, own->phm_dim, own->phm_dim}, at::kFloat);
    const double range = own->phm_init_range;
    shared->rule = own->phm_c_init == "uniform" ? rule.uniform_(-range, range, stream(seed))
                                                : rule.normal_(0.0, range, stream(seed));
    if (own->learn_phm) shared->rule.set_requires_grad(true);
  }
  int64_t layers = 0;
  for (const auto& place : places) layers = std::max(layers, place.layer + 1);
  for (const auto layer : own->leave_out)
    if (layer >= layers)
      throw Error("inject", fmt::format("leave_out has layer {}, and the model has {} layers",
                                        layer, layers));
  std::vector<Grafted> made;
  for (size_t i = 0; i < places.size(); ++i) {
    const auto& place = places[i];
    if (place.kind != SlotKind::block || own->leaves_out(place.layer)) continue;
    if (!(place.part == "attention" ? own->mh_adapter : own->output_adapter)) continue;
    made.push_back({i, std::make_shared<Bottleneck>(own, place.layer, place.hidden, shared,
                                                    made.empty(), place.seed)});
  }
  return made;
}

const bool registered[] = {register_method("BOTTLENECK", {.make = make}),
                           register_method("PARALLEL_ADAPTER", {.make = make}),
                           register_method("COMPACTER", {.make = make})};

}  // namespace
}  // namespace budwood
