#pragma once

#include <cstdint>
#include <vector>

namespace budwood::kernels {

/// What a draw depends on: a seed, and three numbers that say which draw it is.
struct DrawKey {
  uint64_t seed = 0;
  uint32_t first = 0, second = 0, third = 0;
};

/// `count` of the numbers below n, uniformly without replacement, in random order (Fisher and
/// Yates's shuffle with words of Philox). A function of its arguments.
std::vector<int64_t> draw(int64_t n, int64_t count, const DrawKey& key);

}  // namespace budwood::kernels
