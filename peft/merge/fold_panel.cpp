#include <budwood/peft/kernels/fold.h>
#include <budwood/peft/merge/fold_panel.h>

#include <cmath>
#include <utility>

namespace budwood {

Folding::Folding(std::vector<WeightedTerm> terms, bool transposed, int64_t cols,
                 const Panels& panels)
    : terms_(std::move(terms)), transposed_(transposed), cols_(cols), norms_(terms_.size()) {
  for (size_t i = 0; transposed_ && i < terms_.size(); ++i) {
    if (!terms_[i].term.magnitude.defined()) continue;
    std::vector<double> squares(static_cast<size_t>(cols_));
    panels([&](double* panel, int64_t begin, int64_t rows) {
      apply_until(panel, begin, rows, i);
      multiply(panel, begin, rows, i);
      kernels::add_column_squares(panel, rows, cols_, squares.data());
    });
    for (double& square : squares) square = std::sqrt(square);
    norms_[i] = std::move(squares);
  }
}

void Folding::apply(double* panel, int64_t begin, int64_t rows) const {
  apply_until(panel, begin, rows, terms_.size());
}

void Folding::apply_until(double* panel, int64_t begin, int64_t rows, size_t end) const {
  for (const auto& [term, weight] : terms_)
    if (term.input_gain.defined())
      scale(panel, begin, rows, term.input_gain, weight, /*by_row=*/transposed_);
  for (size_t i = 0; i < end; ++i) {
    const auto& [term, weight] = terms_[i];
    multiply(panel, begin, rows, i);
    if (term.gain.defined()) scale(panel, begin, rows, term.gain, weight, !transposed_);
    if (term.magnitude.defined()) scale_to_magnitude(panel, begin, rows, i);
  }
}

void Folding::multiply(double* panel, int64_t begin, int64_t rows, size_t i) const {
  const auto& [term, weight] = terms_[i];
  if (!term.a.defined()) return;
  const int64_t rank = term.a.shape[0], in = term.a.shape[1];
  const kernels::Factor of_in = {term.a.values.data(), 1, in};
  const kernels::Factor of_out = {term.b.values.data(), rank, 1, weight * term.scaling};
  auto left = transposed_ ? of_in : of_out;
  left.data += begin * left.stride;
  kernels::add_product(panel, rows, cols_, left, transposed_ ? of_out : of_in, rank);
}

void Folding::scale(double* panel, int64_t begin, int64_t rows, const FloatArray& gain,
                    double weight, bool by_row) const {
  const float* values = gain.values.data();
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < cols_; ++j) {
      const double factor = values[by_row ? begin + r : j];
      panel[r * cols_ + j] *= weight == 1.0 ? factor : 1.0 + weight * (factor - 1.0);
    }
}

void Folding::scale_to_magnitude(double* panel, int64_t begin, int64_t rows, size_t i) const {
  const float* m = terms_[i].term.magnitude.values.data();
  for (int64_t r = 0; r < rows; ++r) {
    double* row = panel + r * cols_;
    const double norm = transposed_ ? 0.0 : std::sqrt(kernels::sum_of_squares(row, cols_));
    for (int64_t j = 0; j < cols_; ++j) {
      const double own = transposed_ ? norms_[i][static_cast<size_t>(j)] : norm;
      row[j] *= m[transposed_ ? j : begin + r] / own;
    }
  }
}

void Folding::apply_to_bias(double* bias, int64_t count) const {
  for (const auto& [term, weight] : terms_) {
    const auto gain = [&](int64_t i) {
      const double factor = term.gain.values[static_cast<size_t>(i)];
      return weight == 1.0 ? factor : 1.0 + weight * (factor - 1.0);
    };
    for (int64_t i = 0; i < count; ++i) {
      if (term.inner_bias.defined())
        bias[i] += weight * term.scaling * term.inner_bias.values[static_cast<size_t>(i)];
      if (term.gain.defined()) bias[i] *= gain(i);
    }
  }
}

}  // namespace budwood
