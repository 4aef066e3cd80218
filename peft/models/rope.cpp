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

// The share of the plain frequency, (context / wavelength - low) / (high - low), is linear in the
// frequency: a line through the blended dimensions gives the limits, up to a common factor, which
// is chosen so that low is 1.
std::optional<RopeConfig> llama3_of(const RopeConfig& rope, int64_t head_dim) {
  const auto& divisors = rope.frequency_divisors;
  if (rope.type != "default" || divisors.empty() ||
      static_cast<int64_t>(divisors.size()) != head_dim / 2)
    return {};
  const double factor = *std::ranges::max_element(divisors);
  if (!(factor > 1)) return {};
  double n = 0, sum_x = 0, sum_y = 0, sum_xx = 0, sum_xy = 0;
  for (size_t i = 0; i < divisors.size(); ++i) {
    if (divisors[i] <= 1 || divisors[i] >= factor) continue;
    const double exponent = 2.0 * static_cast<double>(i) / static_cast<double>(head_dim);
    const double x = std::pow(rope.theta, -exponent) / (2 * std::numbers::pi);
    const double y = (1 / double{divisors[i]} - 1 / factor) / (1 - 1 / factor);
    n += 1, sum_x += x, sum_y += y, sum_xx += x * x, sum_xy += x * y;
  }
  if (n < 2) return {};
  const double slope = (n * sum_xy - sum_x * sum_y) / (n * sum_xx - sum_x * sum_x);
  const double start = (sum_y - slope * sum_x) / n;
  if (!(slope > 0 && start < 0)) return {};
  RopeConfig found;
  found.type = "llama3";
  found.theta = rope.theta;
  found.factor = factor;
  found.original_max_position = std::llround(-slope / start);
  const auto context = static_cast<double>(found.original_max_position);
  const auto rounded = [](double value) { return std::round(value * 1e3) / 1e3; };
  found.low_freq_factor = rounded(-start * context / slope);
  found.high_freq_factor = rounded(found.low_freq_factor + context / slope);
  const auto wanted = RotaryTable(rope, head_dim).inverse_frequencies();
  const auto made = RotaryTable(found, head_dim).inverse_frequencies();
  if (!((made - wanted).abs() <= 1e-5 * wanted).all().item<bool>()) return {};
  return found;
}

}  // namespace budwood::models
