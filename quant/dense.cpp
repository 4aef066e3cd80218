#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/quant/error.h>
#include <budwood/quant/panels.h>
#include <budwood/quant/weight.h>

namespace budwood::quant {
namespace {

// A weight stored in another dtype than x is converted this many elements at a time.
constexpr int64_t kPanelElements = 1 << 20;

// The kernel that reads W where it lies, when the tensors suit it.
std::optional<kernels::DenseMatrix> matrix_for(const Weight& w, const at::Tensor& x,
                                               const Terms& terms) {
  const auto& m = w.parts[0];
  const auto type = m.scalar_type();
  const bool narrow = type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
  if (!m.is_cpu() || !narrow || !has_gemm(x, terms) || (m.size(1) > 1 && m.stride(1) != 1))
    return {};
  return plain_matrix(m);
}

bool is_plain(const Weight& w, const at::Tensor& x) {
  return w.parts[0].scalar_type() == x.scalar_type();
}

int64_t panel_rows(int64_t row_length) {
  return std::max<int64_t>(1, kPanelElements / std::max<int64_t>(1, row_length));
}

void check_matrix(const Weight& w, int64_t rows, int64_t cols, const std::string& name) {
  if (w.parts.size() != 1)
    throw Error("weight", fmt::format("a {} weight has 1 part, found {}", name, w.parts.size()));
  const auto& m = w.parts[0];
  if (m.dim() != 2 || m.sym_size(0) != rows || m.sym_size(1) != cols)
    throw Error("weight", fmt::format("a {} weight of shape [{}, {}] is a matrix of [{}, {}]", name,
                                      w.out, w.in, rows, cols));
  if (!at::isFloatingType(m.scalar_type()))
    throw Error("weight", fmt::format("a {} weight holds floating point values, found {}", name,
                                      c10::toString(m.scalar_type())));
}

// x Mᵀ with M [n, k] in another dtype than x.
at::Tensor times_transposed(const at::Tensor& x, const at::Tensor& m) {
  const int64_t n = m.size(0), step = panel_rows(m.size(1));
  const auto flat = x.reshape({-1, x.size(-1)});
  auto y = at::empty({flat.size(0), n}, x.options());
  for (int64_t r = 0; r < n; r += step) {
    const int64_t count = std::min(step, n - r);
    auto panel = y.narrow(1, r, count);
    at::mm_out(panel, flat, m.narrow(0, r, count).to(x.scalar_type()).t());
  }
  auto shape = x.sizes().vec();
  shape.back() = n;
  return y.reshape(shape);
}

// x M with M [k, n] in another dtype than x.
at::Tensor times(const at::Tensor& x, const at::Tensor& m) {
  const int64_t k = m.size(0), step = panel_rows(m.size(1));
  const auto flat = x.reshape({-1, k});
  auto y = at::zeros({flat.size(0), m.size(1)}, x.options());
  for (int64_t r = 0; r < k; r += step) {
    const int64_t count = std::min(step, k - r);
    y.addmm_(flat.narrow(1, r, count), m.narrow(0, r, count).to(x.scalar_type()));
  }
  auto shape = x.sizes().vec();
  shape.back() = m.size(1);
  return y.reshape(shape);
}

at::Tensor product(const at::Tensor& left, const at::Tensor& right) {
  return left.reshape({-1, left.size(-1)}).t().mm(right.reshape({-1, right.size(-1)}));
}

class Dense final : public WeightForm {
 public:
  std::string name() const override { return "dense"; }
  void check(const Weight& w) const override { check_matrix(w, w.out, w.in, name()); }
  at::ScalarType dtype(const Weight& w) const override { return w.parts[0].scalar_type(); }

  at::Tensor linear(const Weight& w, const at::Tensor& x) const override {
    return is_plain(w, x) ? at::linear(x, w.parts[0]) : times_transposed(x, w.parts[0]);
  }
  at::Tensor backward_input(const Weight& w, const at::Tensor& grad) const override {
    return is_plain(w, grad) ? at::matmul(grad, w.parts[0]) : times(grad, w.parts[0]);
  }
  at::Tensor linear_plus(const Weight& w, const at::Tensor& x, const Terms& terms) const override {
    if (const auto m = matrix_for(w, x, terms)) return panel_linear(*m, x, terms);
    return WeightForm::linear_plus(w, x, terms);
  }
  at::Tensor backward_input_plus(const Weight& w, const at::Tensor& grad,
                                 const Terms& terms) const override {
    if (const auto m = matrix_for(w, grad, terms)) return panel_backward_input(*m, grad, terms);
    return WeightForm::backward_input_plus(w, grad, terms);
  }
  at::Tensor backward_weight(const Weight& w, const at::Tensor& grad,
                             const at::Tensor& x) const override {
    return product(grad, x).to(dtype(w));
  }
  at::Tensor rows(const Weight& w, int64_t begin, int64_t end, at::ScalarType type) const override {
    return w.parts[0].narrow(0, begin, end - begin).to(type);
  }
  at::Tensor gather(const Weight& w, const at::Tensor& ids, at::ScalarType type) const override {
    return at::embedding(w.parts[0], ids).to(type);
  }
};

class DenseTransposed final : public WeightForm {
 public:
  std::string name() const override { return "dense_transposed"; }
  void check(const Weight& w) const override { check_matrix(w, w.in, w.out, name()); }
  at::ScalarType dtype(const Weight& w) const override { return w.parts[0].scalar_type(); }

  at::Tensor linear(const Weight& w, const at::Tensor& x) const override {
    return is_plain(w, x) ? at::matmul(x, w.parts[0]) : times(x, w.parts[0]);
  }
  at::Tensor backward_input(const Weight& w, const at::Tensor& grad) const override {
    return is_plain(w, grad) ? at::linear(grad, w.parts[0]) : times_transposed(grad, w.parts[0]);
  }
  at::Tensor linear_plus(const Weight& w, const at::Tensor& x, const Terms& terms) const override {
    if (const auto m = matrix_for(w, x, terms))
      return panel_backward_input(*m, x, terms, Along::cols);
    return WeightForm::linear_plus(w, x, terms);
  }
  at::Tensor backward_input_plus(const Weight& w, const at::Tensor& grad,
                                 const Terms& terms) const override {
    if (const auto m = matrix_for(w, grad, terms))
      return panel_linear(*m, grad, terms, Along::cols);
    return WeightForm::backward_input_plus(w, grad, terms);
  }
  at::Tensor backward_weight(const Weight& w, const at::Tensor& grad,
                             const at::Tensor& x) const override {
    return product(x, grad).to(dtype(w));
  }
  at::Tensor rows(const Weight& w, int64_t begin, int64_t end, at::ScalarType type) const override {
    return w.parts[0].narrow(1, begin, end - begin).t().to(type).contiguous();
  }
};

const bool registered =
    register_form(Format::dense, std::make_unique<Dense>()) &&
    register_form(Format::dense_transposed, std::make_unique<DenseTransposed>());

}  // namespace
}  // namespace budwood::quant
