#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/quant/calibrate/packed_matrix.h>
#include <cstdint>

namespace budwood::quant::calibrate {

/// Throws Error unless w is a finite floating point matrix on the CPU that is not empty, and bits
/// is 4 or 8.
void check_matrix(const char* where, const at::Tensor& w, int64_t bits);

/// The group size of a row of `in` columns; -1 = the whole row.
int64_t group_columns(const char* where, int64_t group_size, int64_t in);

/// A group-affine matrix while it is written.
class AffineMatrix final : public PackedMatrix {
 public:
  AffineMatrix(int64_t out, int64_t in, int64_t bits, int64_t group_size, bool symmetric);

  void set_grid(int64_t row, int64_t group, const double* values, int64_t n,
                const double* importance) override;
  double round(int64_t row, int64_t column, int64_t group, double value) override;
  Weight weight() override;

 private:
  int64_t out_, in_, bits_, size_, groups_;
  bool symmetric_;
  at::Tensor codes_, scales_, zeros_;
  uint8_t* code_;
  float* scale_;
  uint8_t* zero_;
};

}  // namespace budwood::quant::calibrate
