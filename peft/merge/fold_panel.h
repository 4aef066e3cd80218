#pragma once

#include <budwood/peft/merge/fold_term.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace budwood {

/// A term with its run-time weight w: s w, and gains 1 + w (g - 1).
struct WeightedTerm {
  FoldTerm term;
  double weight = 1.0;
};

/// Calls use(panel, number of its first row, rows) for all panels [rows, cols] of a matrix in fp64.
using Panels = std::function<void(const std::function<void(double*, int64_t, int64_t)>& use)>;

/// Terms that are folded into one stored matrix, [out, in] or transposed [in, out].
class Folding {
 public:
  /// `panels` gives the matrix, which is read once for each magnitude of a transposed one.
  Folding(std::vector<WeightedTerm> terms, bool transposed, int64_t cols, const Panels& panels);

  /// Rows [begin, begin + rows) of the matrix, in place.
  void apply(double* panel, int64_t begin, int64_t rows) const;
  /// The module's bias [out], in place.
  void apply_to_bias(double* bias, int64_t count) const;

 private:
  void multiply(double* panel, int64_t begin, int64_t rows, size_t i) const;
  void scale(double* panel, int64_t begin, int64_t rows, const FloatArray& gain, double weight,
             bool by_row) const;
  void apply_until(double* panel, int64_t begin, int64_t rows, size_t end) const;
  void scale_to_magnitude(double* panel, int64_t begin, int64_t rows, size_t i) const;

  std::vector<WeightedTerm> terms_;
  bool transposed_;
  int64_t cols_;
  std::vector<std::vector<double>> norms_;  // of columns, for each term with a magnitude
};

}  // namespace budwood
