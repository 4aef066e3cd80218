#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/quant/calibrate/packed_matrix.h>
#include <budwood/quant/error.h>
#include <budwood/quant/kernels/bnb4.h>
#include <budwood/quant/nested_scales.h>
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

namespace budwood::quant::calibrate {
namespace {

// The values of a type in ascending order.
struct Grid {
  std::array<double, 16> values;
  std::array<double, 15> between;  // where the next value becomes the nearer one
  std::array<uint8_t, 16> codes;

  explicit Grid(kernels::Bnb4Type type) : values(), between(), codes() {
    const auto* table = kernels::bnb4_table(type);
    std::iota(codes.begin(), codes.end(), uint8_t{0});
    std::stable_sort(codes.begin(), codes.end(),
                     [&](uint8_t a, uint8_t b) { return table[a] < table[b]; });
    for (size_t i = 0; i < 16; ++i) values[i] = table[codes[i]];
    for (size_t i = 0; i < 15; ++i) between[i] = (values[i] + values[i + 1]) / 2;
  }

  size_t nearest(double value) const {
    size_t place = 0;
    for (const double limit : between) place += value > limit ? 1 : 0;
    return place;
  }
};

double squared_error(const Grid& grid, const double* values, const double* importance, int64_t n,
                     double scale) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double error = values[i] - scale * grid.values[grid.nearest(values[i] / scale)];
    sum += importance[i] * error * error;
  }
  return sum;
}

class Float4Matrix final : public PackedMatrix {
 public:
  Float4Matrix(const std::string& format, int64_t out, int64_t in, int64_t block_size,
               bool double_quant)
      : format_(format == "nf4" ? Format::nf4 : Format::fp4),
        grid_(format == "nf4" ? kernels::Bnb4Type::nf4 : kernels::Bnb4Type::fp4),
        out_(out),
        in_(in),
        size_(block_size),
        groups_(in / block_size),
        double_quant_(double_quant),
        codes_(at::zeros({out, in / 2}, at::kByte)),
        scales_(at::empty({out * groups_}, at::kFloat)),
        code_(codes_.mutable_data_ptr<uint8_t>()),
        scale_(scales_.mutable_data_ptr<float>()) {}

  void set_grid(int64_t row, int64_t group, const double* values, int64_t n,
                const double* importance) override {
    double most = 0;
    for (int64_t i = 0; i < n; ++i) most = std::max(most, std::abs(values[i]));
    if (most > std::numeric_limits<float>::max())
      throw Error("calibrate",
                  fmt::format("the scale of row {}, block {} is beyond float32: its largest value "
                              "is {}",
                              row, group, most));
    double best = most, least = std::numeric_limits<double>::infinity();
    for (double part = 1.0; most > 0 && part > 0.69; part -= 0.025) {
      const auto scale = static_cast<double>(static_cast<float>(part * most));
      const double error = squared_error(grid_, values, importance, n, scale);
      if (error >= least) continue;
      least = error;
      best = scale;
    }
    scale_[row * groups_ + group] = static_cast<float>(best);
  }

  void grids_done() override {
    if (!double_quant_) return;
    nested_ = nest_scales(scales_);
    if (!nested_.status.ok())
      throw Error("calibrate", "a block's scale is beyond what double quantisation can hold");
    kernels::dequantize_absmax(
        {nested_.codes.const_data_ptr<uint8_t>(), nested_.map.const_data_ptr<float>(),
         nested_.absmax.const_data_ptr<float>(), nested_.offset.item<float>()},
        0, scales_.numel(), scale_);
  }

  double round(int64_t row, int64_t column, int64_t group, double value) override {
    const float scale = scale_[row * groups_ + group];
    const size_t place = grid_.nearest(scale == 0 ? 0 : value / scale);
    const int shift = (column & 1) == 0 ? 4 : 0;
    code_[row * (in_ / 2) + column / 2] |= static_cast<uint8_t>(grid_.codes[place] << shift);
    return scale * static_cast<float>(grid_.values[place]);
  }

  Weight weight() override {
    const auto size = at::full({1}, size_, at::TensorOptions().dtype(at::kLong));
    if (!double_quant_) return {{codes_, scales_, size}, format_, out_, in_};
    return {{codes_, nested_.codes, size, nested_.absmax, nested_.map, nested_.offset},
            format_,
            out_,
            in_};
  }

 private:
  Format format_;
  Grid grid_;
  int64_t out_, in_, size_, groups_;
  bool double_quant_;
  at::Tensor codes_, scales_;
  NestedScales nested_;
  uint8_t* code_;
  float* scale_;
};

}  // namespace

std::unique_ptr<PackedMatrix> float4_matrix(const std::string& format, int64_t out, int64_t in,
                                            int64_t block_size, bool double_quant) {
  if (!kernels::is_bnb4_block_size(block_size))
    throw Error("calibrate",
                fmt::format("block size {}; wanted a power of two from 32 to 4096", block_size));
  if (in % block_size != 0)
    throw Error("calibrate", fmt::format("blocks of {} do not divide rows of {}: take another "
                                         "block size, or method 'rtn', whose blocks cross rows",
                                         block_size, in));
  return std::make_unique<Float4Matrix>(format, out, in, block_size, double_quant);
}

}  // namespace budwood::quant::calibrate
