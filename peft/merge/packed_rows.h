#pragma once

#include <budwood/peft/io/dtype.h>

#include <cstdint>
#include <vector>

namespace budwood {

/// What numbers a packed matrix can hold: runs of `block` values along a row (0 = all of it), in
/// which neighbouring levels are at most `share` of the run's largest magnitude apart, or of the
/// range that it spans. Without a share, all numbers of a dtype. Where rows are no whole blocks,
/// the largest of many rows stands for those of blocks, which do not end with rows.
struct PackedLevels {
  int64_t block = 0;
  double share = 0;
  bool of_range = false;
  io::Dtype dtype = io::Dtype::f32;
};

/// A matrix of codes or blocks that is decoded by rows, from several threads.
class PackedRows {
 public:
  virtual ~PackedRows() = default;
  /// Rows [begin, begin + rows) of the matrix, contiguous.
  virtual void read(int64_t begin, int64_t rows, float* to) const = 0;
  virtual PackedLevels levels() const = 0;
  /// Puts in the place of each number of a row what is read after the row has been stored in this
  /// form. False, and nothing is done, where a row alone does not tell.
  virtual bool round(double* values, int64_t cols) const { return (void)values, (void)cols, false; }
};

/// The distance between neighbours of a floating-point dtype at a value.
double step_at(double value, io::Dtype dtype);
/// How far apart the levels are at each value of rows as read. `reach` are the magnitudes that
/// arithmetic has to represent, where the numbers are those of a dtype.
std::vector<double> steps_of(const PackedLevels& levels, const std::vector<float>& values,
                             const std::vector<double>& reach, int64_t cols);

}  // namespace budwood
