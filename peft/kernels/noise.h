#pragma once

#include <cstdint>

/// Standard normal numbers that are a function of where they stand: nothing is remembered, any
/// part can be made again, in any order and on any number of threads. The same bits on every
/// instruction set.
namespace budwood::kernels {

/// What a sequence of numbers depends on.
struct NoiseKey {
  uint64_t seed = 0;
  uint32_t step = 0;
  uint32_t stream = 0;  ///< one for each tensor
};

/// Four words of Philox 4x32 with ten rounds (Salmon et al., Parallel random numbers: as easy as
/// 1, 2, 3, 2011).
struct PhiloxWords {
  uint32_t word[4];
};
PhiloxWords philox(const PhiloxWords& counter, uint32_t key0, uint32_t key1);

/// Numbers [begin, begin + n) of a sequence. Box and Muller's transform of 23 bits each: none is
/// larger than 5.77.
void normal(const NoiseKey& key, uint64_t begin, int64_t n, float* z);

}  // namespace budwood::kernels
