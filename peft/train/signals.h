#pragma once

namespace budwood::train {

/// While an object lives, the first SIGINT or SIGTERM makes a running Trainer stop after what it is
/// doing, write a checkpoint and return; the second one ends the process as it would without this.
/// Earlier handlers come back with the destructor.
class StopOnSignal {
 public:
  StopOnSignal();
  ~StopOnSignal();
  StopOnSignal(const StopOnSignal&) = delete;
  StopOnSignal& operator=(const StopOnSignal&) = delete;

  /// The signal that came since the first object was made, or 0.
  static int received();
};

}  // namespace budwood::train
