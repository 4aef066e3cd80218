#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/models/rope.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <cmath>
#include <numbers>

namespace budwood::models {
namespace {

at::Tensor base_frequencies(double theta, int64_t head_dim) {
  const auto exponent = at::arange(0, head_dim, 2, at::kFloat) / static_cast<double>(head_dim);
  return at::pow(theta, exponent).reciprocal();
}

// Llama 3: long wavelengths are stretched by `factor`, short ones kept, those between blended.
at::Tensor llama3(const at::Tensor& frequencies, const RopeConfig& rope) {
  const auto context = static_cast<double>(rope.original_max_position);
  const double low = context / rope.low_freq_factor, high = context / rope.high_freq_factor;
  const auto wavelength = 2 * std::numbers::pi / frequencies;
  const auto scaled = at::where(wavelength > low, frequencies / rope.factor, frequencies);
  const auto smooth = (context / wavelength - rope.low_freq_factor) /
                      (rope.high_freq_factor - rope.low_freq_factor);
  const auto blended = (1 - smooth) * scaled / rope.factor + smooth * scaled;
  const auto between = wavelength.ge(high).logical_and(wavelength.le(low));
  return at::where(between, blended, scaled);
}

double yarn_mscale(double scale, double mscale) {
  return scale <= 1 ? 1.0 : 0.1 * mscale * std::log(scale) + 1.0;
}

double yarn_attention_factor(const RopeConfig& rope) {
  if (rope.attention_factor) return *rope.attention_factor;
  if (rope.mscale.value_or(0) != 0 && rope.mscale_all_dim.value_or(0) != 0)
    return yarn_mscale(rope.factor, *rope.mscale) / yarn_mscale(rope.factor, *rope.mscale_all_dim);
  return yarn_mscale(rope.factor, 1.0);
}

// YaRN (arXiv 2309.00071): interpolate slow dimensions, keep fast ones, ramp between.
at::Tensor yarn(const RopeConfig& rope, int64_t head_dim) {
  const auto dim = static_cast<double>(head_dim);
  const auto correction = [&](double rotations) {
    return dim *
           std::log(static_cast<double>(rope.original_max_position) /
                    (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(rope.theta));
  };
  double low = correction(rope.beta_fast), high = correction(rope.beta_slow);
  if (rope.truncate) low = std::floor(low), high = std::ceil(high);
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1);
  if (low == high) high += 0.001;

  const auto frequencies = at::pow(rope.theta, at::arange(0, head_dim, 2, at::kFloat) / dim);
  const auto kept = frequencies.reciprocal(), stretched = (rope.factor * frequencies).reciprocal();
  const auto ramp = ((at::arange(head_dim / 2, at::kFloat) - low) / (high - low)).clamp(0, 1);
  const auto share = 1 - ramp;
  return stretched * (1 - share) + kept * share;
}

}  // namespace

RotaryTable::RotaryTable(const RopeConfig& rope, int64_t head_dim) {
  if (rope.type == "default") {
    inverse_frequencies_ = base_frequencies(rope.theta, head_dim);
  } else if (rope.type == "linear") {
    inverse_frequencies_ = base_frequencies(rope.theta, head_dim) / rope.factor;
  } else if (rope.type == "llama3") {
    inverse_frequencies_ = llama3(base_frequencies(rope.theta, head_dim), rope);
  } else if (rope.type == "yarn") {
    inverse_frequencies_ = yarn(rope, head_dim);
    attention_factor_ = yarn_attention_factor(rope);
  } else {
    throw Error("rope", fmt::format("rope type '{}' is not supported; supported: default, linear, "
                                    "llama3, yarn",
                                    rope.type));
  }
  if (!rope.frequency_divisors.empty()) {
    if (static_cast<int64_t>(rope.frequency_divisors.size()) != head_dim / 2)
      throw Error("rope", fmt::format("{} frequency divisors for a head of {}",
                                      rope.frequency_divisors.size(), head_dim));
    inverse_frequencies_ = inverse_frequencies_ / at::tensor(rope.frequency_divisors, at::kFloat);
  }
}

RotaryTable::Angles RotaryTable::at(const at::Tensor& positions) const {
  const auto angles = positions.to(at::kFloat).unsqueeze(1) * inverse_frequencies_.unsqueeze(0);
  return {angles.cos() * attention_factor_, angles.sin() * attention_factor_};
}

}  // namespace budwood::models
