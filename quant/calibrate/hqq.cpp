#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <budwood/quant/calibrate/affine_matrix.h>
#include <budwood/quant/calibrate/hqq.h>
#include <budwood/quant/error.h>
#include <budwood/quant/kernels/affine.h>
#include <algorithm>
#include <cmath>
#include <vector>

namespace budwood::quant::calibrate {
namespace {

void check(const HqqOptions& options) {
  if (options.iterations < 0 || !(options.norm > 0 && options.norm < 1) || !(options.beta > 0) ||
      !(options.beta_growth >= 1))
    throw Error("hqq",
                fmt::format("iterations {}, norm {}, beta {}, beta_growth {}; wanted 0 or "
                            "more, between 0 and 1, above 0, 1 or more",
                            options.iterations, options.norm, options.beta, options.beta_growth));
}

// Ties to even, for magnitudes below 2^22; a loop of these is vectorised.
inline float nearest(float x) {
  constexpr float kMagic = 12582912.0f;
  return (x + kMagic) - kMagic;
}

// One group while its zero point moves.
class Group {
 public:
  Group(const HqqOptions& options, float* scratch)
      : options_(options),
        top_(static_cast<float>((1 << options.bits) - 1)),
        round_zero_(options.round_zero.value_or(options.bits == 4)),
        codes_(scratch) {}

  /// Finds scale and zero of n values; false when the scale is beyond fp32.
  bool solve(const float* w, int64_t n) {
    const auto [low, high] = std::minmax_element(w, w + n);
    scale_ = (*high - *low) / top_;
    if (!std::isfinite(scale_)) return false;
    if (scale_ <= 0.0f || !std::isfinite(1.0f / scale_)) {
      // One value: the zero point alone holds it.
      scale_ = 1.0f;
      zero_ = -*low;
      std::fill_n(codes_, n, 0.0f);
      return true;
    }
    float zero = -*low / scale_;
    if (round_zero_) zero = nearest(zero);
    double beta = options_.beta, least = encode(w, n, zero);
    zero_ = zero;
    for (int64_t t = 0; t < options_.iterations; ++t, beta *= options_.beta_growth) {
      const float next = moved_zero(w, n, zero, beta);
      if (next == zero) break;
      zero = next;
      const double error = encode(w, n, zero);
      if (error < least) {
        least = error;
        zero_ = zero;
      }
    }
    encode(w, n, zero_);
    return true;
  }

  float scale() const { return scale_; }
  float zero() const { return zero_; }
  const float* codes() const { return codes_; }

 private:
  // The codes for a zero point; returns sum |w - ŵ|.
  double encode(const float* w, int64_t n, float zero) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      codes_[i] = std::clamp(nearest(w[i] / scale_ + zero), 0.0f, top_);
      sum += std::abs(w[i] - (codes_[i] - zero) * scale_);
    }
    return sum;
  }

  // mean of q - (w - e) / scale, e the part of the error that the norm counts as an outlier:
  // sign max(0, |error| - |error|^(p-1) / beta).
  float moved_zero(const float* w, int64_t n, float zero, double beta) const {
    const double p = options_.norm, limit = std::pow(beta, -1.0 / (2.0 - p));
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double error = w[i] - (codes_[i] - zero) * scale_, size = std::abs(error);
      double outlier = 0;
      if (size > limit) outlier = std::copysign(size - std::pow(size, p - 1.0) / beta, error);
      sum += codes_[i] - (w[i] - outlier) / scale_;
    }
    return static_cast<float>(sum / static_cast<double>(n));
  }

  const HqqOptions& options_;
  float top_;
  bool round_zero_;
  float* codes_;
  float scale_ = 1.0f, zero_ = 0.0f;
};

}  // namespace

Weight hqq(const at::Tensor& w, const HqqOptions& options) {
  check_matrix("hqq", w, options.bits);
  check(options);
  at::NoGradGuard no_grad;
  const int64_t out = w.size(0), in = w.size(1);
  const int bits = static_cast<int>(options.bits);
  const int64_t size = group_columns("hqq", options.group_size, in);
  const int64_t groups = kernels::affine_groups(in, size),
                bytes = kernels::affine_row_bytes(bits, in);
  auto codes = at::empty({out, bytes}, at::TensorOptions().dtype(at::kByte));
  auto scales = at::empty({out, groups}, at::kFloat), zeros = at::empty({out, groups}, at::kFloat);
  auto* code = codes.mutable_data_ptr<uint8_t>();
  auto* scale = scales.mutable_data_ptr<float>();
  auto* zero = zeros.mutable_data_ptr<float>();
  at::parallel_for(0, out, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> found(static_cast<size_t>(std::min(size, in)));
    std::vector<uint8_t> unpacked(static_cast<size_t>(in));
    Group group(options, found.data());
    for (int64_t row = begin; row < end; ++row) {
      const auto values = w.detach()[row].to(at::kFloat).contiguous();
      const float* from = values.const_data_ptr<float>();
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * size, n = std::min(size, in - first);
        if (!group.solve(from + first, n))
          throw Error("hqq",
                      fmt::format("the scale of row {}, group {} is beyond float32", row, g));
        scale[row * groups + g] = group.scale();
        zero[row * groups + g] = group.zero();
        for (int64_t i = 0; i < n; ++i)
          unpacked[static_cast<size_t>(first + i)] = static_cast<uint8_t>(group.codes()[i]);
      }
      kernels::pack_affine_codes(bits, unpacked.data(), in, code + row * bytes);
    }
  });
  return {{codes, scales, zeros, at::full({1}, size, at::TensorOptions().dtype(at::kLong))},
          bits == 4 ? Format::affine4 : Format::affine8,
          out,
          in};
}

}  // namespace budwood::quant::calibrate
