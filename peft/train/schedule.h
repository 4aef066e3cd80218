#pragma once

#include <cstdint>
#include <string>

namespace budwood::train {

/// Learning rate over a run, as a factor of the highest. The formulas are those of transformers'
/// get_{constant,linear,cosine}_schedule_with_warmup and, with min_ratio,
/// get_cosine_with_min_lr_schedule_with_warmup.
struct Schedule {
  std::string name = "cosine";  ///< "constant", "linear", "cosine"
  int64_t warmup_steps = 0;     ///< the factor rises from 0 over these
  int64_t total_steps = 0;
  double min_ratio = 0.0;  ///< the factor falls to this instead of 0

  /// Factor of the update number `step`, counted from 0. With a warmup the very first is 0.
  double multiplier(int64_t step) const;
  /// Throws Error with field, value and wanted range.
  void validate() const;
};

}  // namespace budwood::train
