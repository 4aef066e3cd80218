#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/custom_function.h>

#include <budwood/peft/kernels/attention.h>
#include <budwood/peft/ops/attention.h>
#include <budwood/peft/ops/dispatch.h>
#include <budwood/peft/ops/kept.h>
#include <budwood/quant/error.h>
#include <budwood/quant/tensors.h>
#include <algorithm>

namespace budwood::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Two = std::tuple<at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

void require(bool holds, const std::string& fact) {
  if (!holds) throw Error("attention", fact);
}

std::string text(at::IntArrayRef values) {
  return fmt::format("[{}]", fmt::join(values.begin(), values.end(), ", "));
}

void check_bounds(const char* name, at::IntArrayRef cu, int64_t tokens) {
  require(
      cu.size() >= 2 && cu.front() == 0 && cu.back() == tokens &&
          std::is_sorted(cu.begin(), cu.end()),
      fmt::format("{} rises from 0 to the number of tokens, {}; found {}", name, tokens, text(cu)));
}

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::IntArrayRef cu_q,
           at::IntArrayRef cu_k, bool causal, int64_t window, int64_t prefix) {
  require(q.dim() == 3 && k.dim() == 3 && k.sizes() == v.sizes() && q.size(2) == k.size(2),
          fmt::format("q is [tokens, heads, d] and k, v are [tokens, kv_heads, d], found {}, {} "
                      "and {}",
                      text(q.sizes()), text(k.sizes()), text(v.sizes())));
  require(
      q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
      fmt::format("q, k and v have one dtype, found {}, {} and {}", c10::toString(q.scalar_type()),
                  c10::toString(k.scalar_type()), c10::toString(v.scalar_type())));
  require(k.size(1) >= 1 && q.size(1) % k.size(1) == 0,
          fmt::format("{} heads are not a multiple of {} key/value heads", q.size(1), k.size(1)));
  require(cu_q.size() == cu_k.size(),
          fmt::format("cu_q and cu_k have one length, found {} and {}", cu_q.size(), cu_k.size()));
  check_bounds("cu_q", cu_q, q.size(0));
  check_bounds("cu_k", cu_k, k.size(0));
  require(window >= 0 && prefix >= 0 && (causal || window == 0),
          fmt::format("window and prefix are not negative, and a window needs causal; found window "
                      "{}, prefix {}, causal {}",
                      window, prefix, causal));
}

// ---- with ATen: other devices, and float64

at::Tensor seen_mask(int64_t queries, int64_t keys, const AttentionShape& shape,
                     const at::Tensor& like) {
  const auto options = like.options().dtype(at::kLong);
  const auto q = at::arange(keys - queries, keys, options).unsqueeze(1);
  const auto k = at::arange(keys, options).unsqueeze(0);
  auto seen = shape.causal ? k.le(q) : k.ge(0).expand({queries, keys});
  if (shape.window > 0) seen = seen.logical_and(k.gt(q - shape.window));
  return shape.prefix > 0 ? seen.logical_or(k.lt(shape.prefix)) : seen;
}

at::Tensor one_sequence(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const AttentionShape& shape) {
  const int64_t heads = q.size(1), repeat = heads / k.size(1), tq = q.size(0), tk = k.size(0);
  if (tk == 0) return at::zeros_like(q);
  const auto first = [&](const at::Tensor& x, int64_t times) {
    return x.transpose(0, 1).repeat_interleave(times, 0).unsqueeze(0);
  };
  const bool plain = shape.causal && tq == tk && shape.window == 0 && shape.prefix == 0;
  std::optional<at::Tensor> mask;
  if (!plain && (shape.causal || shape.window > 0)) mask = seen_mask(tq, tk, shape, q);
  auto out = at::scaled_dot_product_attention(first(q, 1), first(k, repeat), first(v, repeat), mask,
                                              0.0, plain, shape.scale);
  out = out.squeeze(0).transpose(0, 1);
  if (!mask) return out;
  const auto any = mask->any(1).view({tq, 1, 1});
  return at::where(any, out, at::zeros({}, out.options()));
}

at::Tensor with_aten(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const AttentionShape& shape) {
  std::vector<at::Tensor> parts = {at::empty({0, q.size(1), q.size(2)}, q.options())};
  for (size_t s = 0; s + 1 < shape.cu_q.size(); ++s) {
    const auto q0 = shape.cu_q[s], k0 = shape.cu_k[s];
    const auto tq = shape.cu_q[s + 1] - q0, tk = shape.cu_k[s + 1] - k0;
    if (tq > 0)
      parts.push_back(
          one_sequence(q.narrow(0, q0, tq), k.narrow(0, k0, tk), v.narrow(0, k0, tk), shape));
  }
  return at::cat(parts);
}

AttentionShape shape_of(at::IntArrayRef cu_q, at::IntArrayRef cu_k, double scale, bool causal,
                        int64_t window, int64_t prefix) {
  return {cu_q.vec(), cu_k.vec(), scale, window, causal, prefix};
}

// ---- with kernels

kernels::AttentionPlan plan_of(const at::Tensor& q, const at::Tensor& k,
                               const AttentionShape& shape) {
  return {.heads = q.size(1),
          .kv_heads = k.size(1),
          .head_dim = q.size(2),
          .sequences = static_cast<int64_t>(shape.cu_q.size()) - 1,
          .cu_q = shape.cu_q.data(),
          .cu_k = shape.cu_k.data(),
          .scale = static_cast<float>(shape.scale),
          .causal = shape.causal,
          .window = shape.window,
          .prefix = shape.prefix};
}

at::Tensor with_whole_heads(const at::Tensor& x) {
  return x.stride(2) == 1 || x.size(2) == 1 ? x : x.contiguous();
}
kernels::HeadRows rows(const at::Tensor& x) {
  return {x.const_data_ptr(), quant::float_type(x.scalar_type()), x.stride(0), x.stride(1)};
}
kernels::MutableHeadRows target(const at::Tensor& x) {
  return {x.mutable_data_ptr(), quant::float_type(x.scalar_type()), x.stride(0), x.stride(1)};
}

Two forward_entry(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  at::IntArrayRef cu_q, at::IntArrayRef cu_k, double scale, bool causal,
                  int64_t window, int64_t prefix) {
  check(q, k, v, cu_q, cu_k, causal, window, prefix);
  require(quant::kernels_take(q),
          fmt::format("attention_forward takes float32, bfloat16 or float16 on the CPU, found {} "
                      "on {}",
                      c10::toString(q.scalar_type()), q.device().str()));
  const auto shape = shape_of(cu_q, cu_k, scale, causal, window, prefix);
  const auto hq = with_whole_heads(q), hk = with_whole_heads(k), hv = with_whole_heads(v);
  auto out = at::empty(q.sizes(), q.options());
  auto lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat));
  kernels::attention(plan_of(q, k, shape), rows(hq), rows(hk), rows(hv), target(out),
                     lse.mutable_data_ptr<float>(), quant::torch_threads());
  return {out, lse};
}

Three backward_entry(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k,
                     const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
                     at::IntArrayRef cu_q, at::IntArrayRef cu_k, double scale, bool causal,
                     int64_t window, int64_t prefix) {
  check(q, k, v, cu_q, cu_k, causal, window, prefix);
  const auto shape = shape_of(cu_q, cu_k, scale, causal, window, prefix);
  const auto hg = with_whole_heads(grad), ho = with_whole_heads(out);
  const auto hq = with_whole_heads(q), hk = with_whole_heads(k), hv = with_whole_heads(v);
  auto dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options()),
       dv = at::empty(v.sizes(), v.options());
  const auto norms = lse.contiguous();
  kernels::attention_backward(plan_of(q, k, shape), rows(hg), rows(hq), rows(hk), rows(hv),
                              rows(ho), norms.const_data_ptr<float>(), target(dq), target(dk),
                              target(dv), quant::torch_threads());
  return {dq, dk, dv};
}

at::Tensor entry(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                 at::IntArrayRef cu_q, at::IntArrayRef cu_k, double scale, bool causal,
                 int64_t window, int64_t prefix) {
  if (quant::kernels_take(q))
    return std::get<0>(forward_entry(q, k, v, cu_q, cu_k, scale, causal, window, prefix));
  check(q, k, v, cu_q, cu_k, causal, window, prefix);
  return with_aten(q, k, v, shape_of(cu_q, cu_k, scale, causal, window, prefix));
}

using Lengths = at::IntArrayRef;
using Forward = Two(const at::Tensor&, const at::Tensor&, const at::Tensor&, Lengths, Lengths,
                    double, bool, int64_t, int64_t);
using Backward = Three(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                       const at::Tensor&, const at::Tensor&, Lengths, Lengths, double, bool,
                       int64_t, int64_t);

class AttentionFunction : public torch::autograd::Function<AttentionFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, Lengths cu_q, Lengths cu_k, double scale,
                            bool causal, int64_t window, int64_t prefix) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const Operator<Forward> op("budwood::attention_forward");
    auto [out, lse] = op(q, k, v, cu_q, cu_k, scale, causal, window, prefix);
    ctx->saved_data["cu_q"] = cu_q.vec();
    ctx->saved_data["cu_k"] = cu_k.vec();
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["causal"] = causal;
    ctx->saved_data["window"] = window;
    ctx->saved_data["prefix"] = prefix;
    keep_exactly(out);
    ctx->save_for_backward({q, k, v, out, lse});
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const Operator<Backward> op("budwood::attention_backward");
    const auto saved = ctx->get_saved_variables();
    const auto& data = ctx->saved_data;
    const auto cu_q = data.at("cu_q").toIntVector(), cu_k = data.at("cu_k").toIntVector();
    auto [dq, dk, dv] = op(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], cu_q, cu_k,
                           data.at("scale").toDouble(), data.at("causal").toBool(),
                           data.at("window").toInt(), data.at("prefix").toInt());
    return {dq, dk, dv, {}, {}, {}, {}, {}, {}};
  }
};

at::Tensor autograd_entry(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          Lengths cu_q, Lengths cu_k, double scale, bool causal, int64_t window,
                          int64_t prefix) {
  if (quant::kernels_take(q))
    return AttentionFunction::apply(q, k, v, cu_q, cu_k, scale, causal, window, prefix);
  check(q, k, v, cu_q, cu_k, causal, window, prefix);
  return with_aten(q, k, v, shape_of(cu_q, cu_k, scale, causal, window, prefix));
}

at::Tensor like(const at::Tensor& t) {
  return at::empty_symint(t.sym_sizes(), t.options());
}

at::Tensor meta(const at::Tensor& q, const at::Tensor&, const at::Tensor&, Lengths, Lengths, double,
                bool, int64_t, int64_t) {
  return like(q);
}
Two forward_meta(const at::Tensor& q, const at::Tensor&, const at::Tensor&, Lengths, Lengths,
                 double, bool, int64_t, int64_t) {
  return {like(q), at::empty_symint({q.sym_size(1), q.sym_size(0)}, q.options().dtype(at::kFloat))};
}
Three backward_meta(const at::Tensor&, const at::Tensor& q, const at::Tensor& k,
                    const at::Tensor& v, const at::Tensor&, const at::Tensor&, Lengths, Lengths,
                    double, bool, int64_t, int64_t) {
  return {like(q), like(k), like(v)};
}

}  // namespace

#define BUDWOOD_ATTENTION_ARGUMENTS \
  "int[] cu_q, int[] cu_k, float scale, bool causal=True, int window=0, int prefix=0)"
TORCH_LIBRARY_FRAGMENT(budwood, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("attention(Tensor q, Tensor k, Tensor v, " BUDWOOD_ATTENTION_ARGUMENTS " -> Tensor", tags);
  m.def("attention_forward(Tensor q, Tensor k, Tensor v, " BUDWOOD_ATTENTION_ARGUMENTS
        " -> (Tensor, Tensor)",
        tags);
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
      "lse, " BUDWOOD_ATTENTION_ARGUMENTS " -> (Tensor, Tensor, Tensor)",
      tags);
  implement(m, "attention", entry);
  implement(m, "attention_forward", forward_entry);
  implement(m, "attention_backward", backward_entry);
  m.impl("attention", c10::DispatchKey::Autograd, autograd_entry);
  without_gradient(m, "attention_forward");
  without_gradient(m, "attention_backward");
}
#undef BUDWOOD_ATTENTION_ARGUMENTS

TORCH_LIBRARY_IMPL(budwood, Meta, m) {
  m.impl("attention", meta);
  m.impl("attention_forward", forward_meta);
  m.impl("attention_backward", backward_meta);
}

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const AttentionShape& shape) {
  static const Operator<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, Lengths,
                                   Lengths, double, bool, int64_t, int64_t)>
      op("budwood::attention");
  return op(q, k, v, shape.cu_q, shape.cu_k, shape.scale, shape.causal, shape.window, shape.prefix);
}

}  // namespace budwood::ops
