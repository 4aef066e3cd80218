#include <budwood/peft/train/schedule.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace budwood::train {

double Schedule::multiplier(int64_t step) const {
  const auto s = static_cast<double>(step);
  const auto warmup = static_cast<double>(warmup_steps);
  if (step < warmup_steps) return s / std::max(1.0, warmup);
  if (name == "constant") return 1.0;
  const double length = std::max(1.0, static_cast<double>(total_steps) - warmup);
  const double progress = (s - warmup) / length;
  double factor;
  if (name == "linear")
    factor = std::max(0.0, (static_cast<double>(total_steps) - s) / length);
  else
    factor = std::max(0.0, 0.5 * (1.0 + std::cos(std::numbers::pi * std::min(1.0, progress))));
  return factor * (1.0 - min_ratio) + min_ratio;
}

void Schedule::validate() const {
  if (name != "constant" && name != "linear" && name != "cosine")
    throw Error("Schedule", fmt::format("name is \"{}\", wanted \"constant\", \"linear\" or "
                                        "\"cosine\"",
                                        name));
  if (warmup_steps < 0)
    throw Error("Schedule", fmt::format("warmup_steps is {}, wanted at least 0", warmup_steps));
  if (total_steps < 0)
    throw Error("Schedule", fmt::format("total_steps is {}, wanted at least 0", total_steps));
  if (!(min_ratio >= 0.0 && min_ratio <= 1.0))
    throw Error("Schedule", fmt::format("min_ratio is {}, wanted 0 to 1", min_ratio));
}

}  // namespace budwood::train
