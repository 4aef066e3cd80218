#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/quant/error.h>
#include <budwood/quant/weight.h>
#include <map>

namespace budwood::quant {
namespace {

using Forms = std::map<Format, std::unique_ptr<WeightForm>>;

Forms& forms() {
  static Forms table;
  return table;
}

}  // namespace

bool register_form(Format format, std::unique_ptr<WeightForm> form) {
  return forms().emplace(format, std::move(form)).second;
}

const WeightForm& form_of(Format format) {
  const auto it = forms().find(format);
  if (it == forms().end()) {
    std::string known;
    for (const auto& [id, form] : forms())
      known += fmt::format("{}{} ({})", known.empty() ? "" : ", ", static_cast<int64_t>(id),
                           form->name());
    throw Error("weight", fmt::format("unknown weight format {}; known: {}",
                                      static_cast<int64_t>(format), known));
  }
  return *it->second;
}

Weight Weight::dense(at::Tensor w) {
  TORCH_CHECK(w.dim() == 2, "[weight] a dense weight has 2 dimensions, found ", w.dim());
  const int64_t out = w.size(0), in = w.size(1);
  return {{std::move(w)}, Format::dense, out, in};
}

Weight Weight::dense_transposed(at::Tensor w) {
  TORCH_CHECK(w.dim() == 2, "[weight] a dense weight has 2 dimensions, found ", w.dim());
  const int64_t out = w.size(1), in = w.size(0);
  return {{std::move(w)}, Format::dense_transposed, out, in};
}

Weight Weight::from_parts(std::vector<at::Tensor> parts, int64_t format, int64_t out, int64_t in) {
  Weight w{std::move(parts), static_cast<Format>(format), out, in};
  form_of(w.format).check(w);
  return w;
}

at::Tensor Weight::linear(const at::Tensor& x, const Terms& terms) const {
  return form_of(format).linear_plus(*this, x, terms);
}

at::Tensor Weight::backward_input(const at::Tensor& grad, const Terms& terms) const {
  return form_of(format).backward_input_plus(*this, grad, terms);
}

at::Tensor Weight::backward_weight(const at::Tensor& grad, const at::Tensor& x) const {
  return form_of(format).backward_weight(*this, grad, x);
}

at::Tensor Weight::rows(int64_t begin, int64_t end, at::ScalarType dtype) const {
  if (begin < 0 || end < begin || end > out)
    throw Error("weight", fmt::format("rows [{}, {}) of a weight with {} rows", begin, end, out));
  return form_of(format).rows(*this, begin, end, dtype);
}

at::Tensor Weight::gather(const at::Tensor& ids, at::ScalarType dtype) const {
  return form_of(format).gather(*this, ids, dtype);
}

at::ScalarType Weight::dtype() const {
  return form_of(format).dtype(*this);
}

bool Weight::packed() const {
  return form_of(format).packed();
}

int64_t Weight::bytes() const {
  int64_t sum = 0;
  for (const auto& part : parts) sum += static_cast<int64_t>(part.nbytes());
  return sum;
}

void add_terms(at::Tensor& y, const Terms& terms) {
  if (terms.left.defined()) {
    if (y.scalar_type() == terms.left.scalar_type())
      y.addmm_(terms.left, terms.right, 1, terms.scale);
    else
      y.add_(terms.left.mm(terms.right), terms.scale);
  }
  if (terms.bias) y.add_(terms.bias->to(y.scalar_type()));
  if (terms.onto.defined()) y.add_(terms.onto.reshape(y.sizes()));
}

at::Tensor plus(at::Tensor y, const Terms& terms) {
  auto flat = y.view({-1, y.size(-1)});
  add_terms(flat, terms);
  return y;
}

at::Tensor times_gain(at::Tensor t, const Terms& terms) {
  return terms.gain.defined() ? t * terms.gain.to(t.scalar_type()) : t;
}

at::Tensor WeightForm::linear_plus(const Weight& w, const at::Tensor& x, const Terms& terms) const {
  return plus(times_gain(linear(w, x), terms), terms);
}

at::Tensor WeightForm::backward_input_plus(const Weight& w, const at::Tensor& grad,
                                           const Terms& terms) const {
  return plus(backward_input(w, times_gain(grad, terms)), terms);
}

at::Tensor WeightForm::backward_weight(const Weight&, const at::Tensor&, const at::Tensor&) const {
  throw Error("weight", fmt::format("a {} weight is frozen: it has no weight gradient", name()));
}

at::Tensor WeightForm::gather(const Weight& w, const at::Tensor& ids, at::ScalarType dtype) const {
  const auto flat = ids.reshape({-1}).to(at::kCPU);
  auto result = at::empty({flat.numel(), w.in}, w.parts[0].options().dtype(dtype));
  const auto* id = flat.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < flat.numel(); ++i) {
    if (id[i] < 0 || id[i] >= w.out)
      throw Error("gather", fmt::format("row {} of a table with {} rows", id[i], w.out));
    result[i].copy_(rows(w, id[i], id[i] + 1, dtype)[0]);
  }
  auto shape = ids.sizes().vec();
  shape.push_back(w.in);
  return result.reshape(shape);
}

}  // namespace budwood::quant
