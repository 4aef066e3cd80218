#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/quant/calibrate/affine_matrix.h>
#include <budwood/quant/error.h>
#include <budwood/quant/kernels/affine.h>
#include <algorithm>
#include <cmath>

namespace budwood::quant::calibrate {

void check_matrix(const char* where, const at::Tensor& w, int64_t bits) {
  if (w.dim() != 2 || w.numel() == 0 || !at::isFloatingType(w.scalar_type()) || !w.is_cpu())
    throw Error(where,
                fmt::format("wanted a floating point matrix on the CPU that is not empty, "
                            "found {} dimensions, {} elements of {} on {}",
                            w.dim(), w.numel(), c10::toString(w.scalar_type()), w.device().str()));
  if (bits != 4 && bits != 8) throw Error(where, fmt::format("{} bits; wanted 4 or 8", bits));
  if (!w.isfinite().all().item<bool>())
    throw Error(where, "the weight holds values that are not finite");
}

int64_t group_columns(const char* where, int64_t group_size, int64_t in) {
  if (group_size == -1) return in;
  if (group_size < 1)
    throw Error(where, fmt::format("group size {}; wanted 1 or more, or -1", group_size));
  return group_size;
}

AffineMatrix::AffineMatrix(int64_t out, int64_t in, int64_t bits, int64_t group_size,
                           bool symmetric)
    : out_(out),
      in_(in),
      bits_(bits),
      size_(group_size),
      groups_(kernels::affine_groups(in, group_size)),
      symmetric_(symmetric) {
  const auto bytes = at::TensorOptions().dtype(at::kByte);
  codes_ = at::zeros({out, kernels::affine_row_bytes(static_cast<int>(bits), in)}, bytes);
  scales_ = at::empty({out, groups_}, at::kFloat);
  zeros_ = at::empty({out, groups_}, bytes);
  code_ = codes_.mutable_data_ptr<uint8_t>();
  scale_ = scales_.mutable_data_ptr<float>();
  zero_ = zeros_.mutable_data_ptr<uint8_t>();
}

void AffineMatrix::set_grid(int64_t row, int64_t group, const double* values, int64_t n,
                            const double* /*importance*/) {
  double least = 0, most = 0;
  for (int64_t i = 0; i < n; ++i) {
    least = std::min(least, values[i]);
    most = std::max(most, values[i]);
  }
  const auto grid = kernels::affine_grid(
      static_cast<int>(bits_),
      symmetric_ ? kernels::AffineMode::symmetric : kernels::AffineMode::asymmetric,
      static_cast<float>(least), static_cast<float>(most));
  if (!std::isfinite(grid.scale))
    throw Error("calibrate", fmt::format("the scale of row {}, group {} is beyond float32: its "
                                         "values reach from {} to {}",
                                         row, group, least, most));
  scale_[row * groups_ + group] = grid.scale;
  zero_[row * groups_ + group] = static_cast<uint8_t>(grid.zero);
}

double AffineMatrix::round(int64_t row, int64_t column, int64_t group, double value) {
  const double scale = scale_[row * groups_ + group];
  const int zero = zero_[row * groups_ + group], top = (1 << bits_) - 1;
  const double steps = std::clamp(std::nearbyint(value / scale), -256.0, 256.0);
  const int q = std::clamp(static_cast<int>(steps) + zero, 0, top);
  if (bits_ == 8)
    code_[row * in_ + column] = static_cast<uint8_t>(q);
  else
    code_[row * ((in_ + 1) / 2) + column / 2] |= static_cast<uint8_t>(q << (column & 1) * 4);
  return scale * (q - zero);
}

Weight AffineMatrix::weight() {
  return {{std::move(codes_), std::move(scales_), std::move(zeros_),
           at::full({1}, size_, at::TensorOptions().dtype(at::kLong))},
          bits_ == 4 ? Format::affine4 : Format::affine8,
          out_,
          in_};
}

}  // namespace budwood::quant::calibrate
