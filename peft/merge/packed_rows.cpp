#include <budwood/peft/merge/packed_rows.h>

#include <algorithm>
#include <cmath>

namespace budwood {

double step_at(double value, io::Dtype dtype) {
  const int digits = dtype == io::Dtype::f32 ? 23 : dtype == io::Dtype::bf16 ? 7 : 10;
  const int smallest = dtype == io::Dtype::f16 ? -14 : -126;
  return std::ldexp(1.0, std::max(value > 0 ? std::ilogb(value) : smallest, smallest) - digits);
}

std::vector<double> steps_of(const PackedLevels& levels, const std::vector<float>& values,
                             const std::vector<double>& reach, int64_t cols) {
  std::vector<double> steps(values.size());
  if (levels.share == 0) {
    std::ranges::transform(reach, steps.begin(),
                           [&](double value) { return step_at(value, levels.dtype); });
    return steps;
  }
  auto block = static_cast<size_t>(levels.block > 0 ? levels.block : cols);
  if (static_cast<size_t>(cols) % block != 0) block = values.size();
  for (size_t begin = 0; begin < values.size(); begin += block) {
    const size_t end = begin + block;
    const auto [least, most] = std::minmax_element(values.begin() + begin, values.begin() + end);
    const double low = *least, high = *most;
    const double span = levels.of_range ? high - low : std::max(-low, high);
    // A run of one value still tells numbers of fp32 apart.
    const double step =
        std::max(span * levels.share, step_at(std::max(-low, high), io::Dtype::f32));
    std::fill(steps.begin() + begin, steps.begin() + end, step);
  }
  return steps;
}

}  // namespace budwood
