#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <budwood/peft/io/dtype.h>
#include <budwood/peft/residual.h>
#include <budwood/peft/svd.h>
#include <budwood/quant/checkpoints/checkpoint.h>
#include <budwood/quant/error.h>
#include <budwood/quant/memory_pool.h>
#include <algorithm>
#include <cmath>

namespace budwood {
namespace {

constexpr int64_t kExactSide = 1024;
constexpr int64_t kIterations = 16;

struct Factors {
  at::Tensor a, b;  // fp64; b a is the approximation
};

double norm_of(const at::Tensor& m) {
  return m.norm().item<double>();
}

// The best approximation of m [out, in], fp64, of rank r: both factors with the roots of the
// singular values.
Factors leading(const at::Tensor& m, int64_t rank) {
  const bool wide = m.size(0) <= m.size(1);
  if (std::min(m.size(0), m.size(1)) > kExactSide) {
    const auto [u, s, vt] = leading_triplets(m.to(at::kFloat), rank, kIterations);
    const auto root = s.to(at::kDouble).sqrt();
    return {root.unsqueeze(1) * vt, u * root};
  }
  // Eigenvectors of the smaller Gram matrix, then the other side by a product.
  const auto gram = wide ? m.mm(m.t()) : m.t().mm(m);
  const auto [values, vectors] = at::linalg_eigh(gram);
  const auto basis = vectors.narrow(1, vectors.size(1) - rank, rank).flip(1);
  const auto root =
      values.narrow(0, values.size(0) - rank, rank).flip(0).clamp_min(1e-300).sqrt().sqrt();
  if (wide) return {basis.t().mm(m) / root.unsqueeze(1), basis * root};
  return {root.unsqueeze(1) * basis.t(), m.mm(basis) / root};
}

at::Tensor values_of(const quant::Weight& q) {
  return q.rows(0, q.out, at::kFloat).to(at::kDouble);
}

void set_factors(ResidualStart& start, const Factors& factors, double scaling) {
  start.a = factors.a.to(at::kFloat).contiguous();
  start.b = (factors.b / scaling).to(at::kFloat).contiguous();
}

ResidualStart loftq(const at::Tensor& w, const quant::Weight& q, int64_t rank, double scaling,
                    int64_t iterations) {
  ResidualStart best;
  const double size = norm_of(w);
  auto base = q;
  at::Tensor product;
  for (int64_t t = 1; t <= iterations; ++t) {
    if (t > 1) base = quant::requantize((w - product).to(at::kFloat), q);
    const auto rest = w - values_of(base);
    const auto factors = leading(rest, rank);
    product = factors.b.mm(factors.a);
    const double error = norm_of(rest - product) / size;
    if (t == 1) best.before = norm_of(rest) / size;
    if (t > 1 && error >= best.after) continue;
    set_factors(best, factors, scaling);
    best.after = error;
    best.iteration = t;
    if (t > 1) best.base = base;
  }
  return best;
}

ResidualStart qpissa(const at::Tensor& w, const quant::Weight& q, int64_t rank, double scaling) {
  ResidualStart start;
  const double size = norm_of(w);
  const auto factors = leading(w, rank);
  const auto product = factors.b.mm(factors.a);
  start.base = quant::requantize((w - product).to(at::kFloat), q);
  start.before = norm_of(w - values_of(q)) / size;
  start.after = norm_of(w - values_of(*start.base) - product) / size;
  set_factors(start, factors, scaling);
  return start;
}

ResidualStart eora(const at::Tensor& w, const quant::Weight& q, int64_t rank, double scaling,
                   const at::Tensor& covariance) {
  const auto [values, vectors] = at::linalg_eigh(covariance.to(at::kDouble));
  // Directions in which the inputs do not go have no root and no inverse.
  const auto largest = values.max().item<double>();
  const auto there = values > 1e-10 * largest;
  const auto root = at::where(there, values, 0.0).sqrt();
  const auto inverse = at::where(there, 1.0 / root, 0.0);
  const auto s = vectors * root;
  const auto rest = (w - values_of(q)).mm(s);
  const auto factors = leading(rest, rank);
  ResidualStart start;
  const double size = norm_of(w.mm(s));
  start.before = norm_of(rest) / size;
  start.after = norm_of(rest - factors.b.mm(factors.a)) / size;
  set_factors(start, {(factors.a * inverse).mm(vectors.t()), factors.b}, scaling);
  return start;
}

}  // namespace

void ResidualOptions::validate() const {
  if (method != "loftq" && method != "qpissa" && method != "eora")
    throw Error("ResidualOptions",
                fmt::format("method is '{}', wanted 'loftq', 'qpissa' or 'eora'", method));
  if (iterations < 1 || (method != "loftq" && iterations != 1))
    throw Error("ResidualOptions", fmt::format("iterations is {}, wanted {}", iterations,
                                               method == "loftq" ? "1 or more" : "1"));
}

ResidualStart residual_start(const at::Tensor& w, const quant::Weight& q, int64_t rank,
                             double scaling, const ResidualOptions& options,
                             const at::Tensor& covariance) {
  constexpr const char* kWhere = "residual_start";
  const at::NoGradGuard no_grad;
  options.validate();
  if (w.dim() != 2 || w.size(0) != q.out || w.size(1) != q.in)
    throw Error(kWhere, fmt::format("the original is {}, the quantised matrix [{}, {}]",
                                    io::shape_text(w.sizes().vec()), q.out, q.in));
  if (!q.packed()) throw Error(kWhere, "the weight is not quantised: nothing was taken from it");
  if (rank < 1 || rank > std::min(q.out, q.in))
    throw Error(kWhere, fmt::format("rank {} for a matrix [{}, {}]", rank, q.out, q.in));
  if (!std::isfinite(scaling) || scaling == 0)
    throw Error(kWhere, fmt::format("the scaling is {}, wanted a finite number but 0", scaling));
  const auto wide = w.to(at::kDouble);
  if (!wide.isfinite().all().item<bool>())
    throw Error(kWhere, "the original holds values that are not finite");
  // Matrices in fp64 that come and go leave holes in the heap, in the end more than the model
  // takes.
  quant::trim_heap_after(static_cast<int64_t>(wide.nbytes()));
  if (options.method == "loftq") return loftq(wide, q, rank, scaling, options.iterations);
  if (options.method == "qpissa") return qpissa(wide, q, rank, scaling);
  if (!covariance.defined() || covariance.sizes() != at::IntArrayRef({q.in, q.in}))
    throw Error(kWhere,
                fmt::format("eora takes the covariance [{}, {}] of the inputs", q.in, q.in));
  return eora(wide, q, rank, scaling, covariance);
}

}  // namespace budwood
