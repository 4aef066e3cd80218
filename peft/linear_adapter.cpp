#include <ATen/ATen.h>

#include <budwood/peft/fold.h>
#include <budwood/peft/kernels/fold.h>
#include <budwood/peft/linear_adapter.h>
#include <budwood/peft/ops/affine_linear.h>
#include <budwood/peft/ops/dora_linear.h>
#include <budwood/peft/ops/lora_linear.h>
#include <budwood/quant/ops.h>
#include <algorithm>
#include <cmath>

namespace budwood {
namespace {

std::optional<at::Tensor> if_defined(const at::Tensor& t) {
  return t.defined() ? std::optional(t) : std::nullopt;
}

// s (D(x) Aᵀ) Bᵀ + s b_B in the dtype of A.
at::Tensor low_rank(const LinearTerm& term, const at::Tensor& x) {
  auto input = x.to(term.a.scalar_type());
  if (term.dropout > 0) input = at::dropout(input, term.dropout, /*train=*/true);
  auto added = at::linear(at::linear(input, term.a), term.b);
  if (term.inner_bias.defined()) added = added + term.inner_bias;
  return term.scaling == 1.0 ? added : added * term.scaling;
}

// lora_linear or dora_linear does all of it.
bool fits_an_operator(const LinearTerm& term) {
  const bool low_rank = term.a.defined() && term.dropout == 0 && !term.inner_bias.defined();
  return low_rank && (!term.gain.defined() ||
                      (term.gain_spares_bias && term.gain.scalar_type() == term.a.scalar_type()));
}

at::Tensor apply_operator(const LinearBase& base, const LinearTerm& term, const at::Tensor& x) {
  const auto bias = if_defined(base.bias);
  if (!term.gain.defined())
    return ops::lora_linear(x, base.weight, bias, term.a, term.b, term.scaling);
  return ops::dora_linear(x, base.weight, bias, term.a, term.b, term.gain, term.scaling);
}

bool is_frozen(const quant::Weight& weight) {
  for (const auto& part : weight.parts)
    if (part.requires_grad()) return false;
  return true;
}

}  // namespace

at::Tensor apply_terms(const LinearBase& base, const std::vector<LinearTerm>& terms,
                       const at::Tensor& x) {
  if (!terms.empty() && terms[0].own_weight.defined()) {
    const auto& own = terms[0];
    const auto y =
        at::linear(x.to(own.own_weight.scalar_type()), own.own_weight, if_defined(own.own_bias));
    return y.to(x.scalar_type());
  }
  at::Tensor read = x;
  for (const auto& term : terms)
    if (term.input_gain.defined()) read = read * term.input_gain.to(x.scalar_type());

  const bool first_done = !terms.empty() && fits_an_operator(terms[0]) && read.is_same(x) &&
                          is_frozen(base.weight) && !terms[0].scales.defined();
  // The bias is added at the end when the first gain spares it: nothing is then subtracted.
  const bool late_bias =
      !first_done && !terms.empty() && terms[0].gain.defined() && terms[0].gain_spares_bias;
  const auto bias = late_bias ? std::nullopt : if_defined(base.bias);
  at::Tensor y;
  const auto rescaled = std::find_if(terms.begin(), terms.end(),
                                     [](const auto& term) { return term.scales.defined(); });
  if (rescaled != terms.end()) {
    y = ops::affine_linear(read, base.weight, bias, rescaled->scales, rescaled->zeros);
  } else if (first_done) {
    y = apply_operator(base, terms[0], x);
  } else {
    y = quant::linear(read, base.weight, bias);
  }
  const auto dtype = y.scalar_type();
  for (size_t i = first_done; i < terms.size(); ++i) {
    const auto& term = terms[i];
    const bool spares = term.gain.defined() && term.gain_spares_bias && base.bias.defined();
    if (spares && !(i == 0 && late_bias)) y = y - base.bias;
    if (term.a.defined()) y = y + low_rank(term, x);
    if (!term.a.defined() && term.inner_bias.defined()) y = y + term.inner_bias * term.scaling;
    if (term.gain.defined()) y = y * term.gain;
    if (spares) y = y + base.bias;
  }
  return y.to(dtype);
}

at::Tensor fold_rows(at::Tensor rows, int64_t begin, const std::vector<LinearTerm>& terms) {
  const int64_t n = rows.size(0), in = rows.size(1);
  const auto wide = [](const at::Tensor& t) { return t.detach().to(at::kCPU, at::kDouble); };
  const auto plain = [](const at::Tensor& t) {
    return t.detach().to(at::kCPU, at::kFloat).contiguous();
  };
  for (const auto& term : terms)
    if (term.rescaled) rows = term.rescaled->rows(begin, begin + n, at::kDouble).contiguous();
  if (!terms.empty() && terms[0].own_weight.defined())
    return wide(terms[0].own_weight.narrow(0, begin, n));
  for (const auto& term : terms)
    if (term.input_gain.defined()) rows = rows * wide(term.input_gain);
  for (const auto& term : terms) {
    if (term.a.defined()) {
      const auto a = plain(term.a), b = plain(term.b);
      const int64_t rank = a.size(0);
      kernels::add_product(rows.mutable_data_ptr<double>(), n, in,
                           {b.const_data_ptr<float>() + begin * rank, rank, 1, term.scaling},
                           {a.const_data_ptr<float>(), 1, in}, rank);
    }
    if (term.magnitude.defined()) {
      auto gain = wide(term.magnitude.narrow(0, begin, n)).contiguous();
      auto* values = gain.mutable_data_ptr<double>();
      for (int64_t i = 0; i < n; ++i)
        values[i] /= std::sqrt(kernels::sum_of_squares(rows.const_data_ptr<double>() + i * in, in));
      rows = rows * gain.unsqueeze(1);
    } else if (term.gain.defined()) {
      rows = rows * wide(term.gain.narrow(0, begin, n)).unsqueeze(1);
    }
  }
  return rows;
}

at::Tensor fold_bias(const at::Tensor& bias, const std::vector<LinearTerm>& terms) {
  if (!terms.empty() && terms[0].own_bias.defined())
    return terms[0].own_bias.detach().to(bias.defined() ? bias.scalar_type() : at::kFloat);
  at::Tensor sum = bias.defined() ? bias.detach().to(at::kDouble) : at::Tensor();
  for (const auto& term : terms) {
    if (term.inner_bias.defined()) {
      const auto own = term.inner_bias.detach().to(at::kDouble) * term.scaling;
      sum = sum.defined() ? sum + own : own;
    }
    if (sum.defined() && term.gain.defined() && !term.gain_spares_bias)
      sum = sum * term.gain.detach().to(at::kDouble);
  }
  if (!sum.defined()) return bias;
  return rounded_once(sum, bias.defined() ? bias.scalar_type() : at::kFloat).to(sum.device());
}

}  // namespace budwood
