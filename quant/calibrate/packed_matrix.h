#pragma once

#include <budwood/quant/weight.h>
#include <memory>
#include <string>

namespace budwood::quant::calibrate {

/// A packed matrix while it is written value by value: the grids of its groups first, then codes.
/// Rows may be written from several threads.
class PackedMatrix {
 public:
  virtual ~PackedMatrix() = default;

  /// The grid of one group from n values, whose errors count by `importance` where a grid is chosen
  /// among several.
  virtual void set_grid(int64_t row, int64_t group, const double* values, int64_t n,
                        const double* importance) = 0;
  /// Called once when all grids were set before the first code.
  virtual void grids_done() {}
  /// Writes the code nearest to the value and returns what it stands for.
  virtual double round(int64_t row, int64_t column, int64_t group, double value) = 0;
  /// Takes the result out.
  virtual Weight weight() = 0;

  /// The grids of all groups of `size` columns of consecutive rows [n, in], importance [in], both
  /// fp64 and contiguous.
  void set_grids(int64_t first_row, const at::Tensor& rows, int64_t size,
                 const at::Tensor& importance);
};

/// bitsandbytes' 4 bits, "nf4" or "fp4", in blocks of whole rows. A block's scale is what rounds
/// its values with the least weighted squared error, of some between its largest value and 0.7 of
/// it. With double_quant the grids have to be done before the first code. Throws Error for a block
/// size that is not allowed or does not divide `in`.
std::unique_ptr<PackedMatrix> float4_matrix(const std::string& format, int64_t out, int64_t in,
                                            int64_t block_size, bool double_quant);

}  // namespace budwood::quant::calibrate
