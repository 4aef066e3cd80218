#pragma once

#include <budwood/peft/kernels/noise.h>

/// The inner loops of noise.h.
namespace budwood::kernels {

/// Counters that are worked on together, and numbers that come of them.
constexpr int64_t kNoiseCounters = 64;
constexpr int64_t kNoiseNumbers = 4 * kNoiseCounters;

struct NoisePath {
  /// z [kNoiseNumbers] of counters first, first + 1, ...
  void (*normal)(const NoiseKey& key, uint64_t first, float* z);
};

extern const NoisePath kNoiseScalar;
extern const NoisePath kNoiseAvx2;
extern const NoisePath kNoiseAvx512;

}  // namespace budwood::kernels
