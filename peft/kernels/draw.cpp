#include <budwood/peft/kernels/draw.h>
#include <budwood/peft/kernels/noise.h>

#include <cstddef>
#include <numeric>
#include <utility>

namespace budwood::kernels {

std::vector<int64_t> draw(int64_t n, int64_t count, const DrawKey& key) {
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  for (int64_t i = 0; i < count; ++i) {
    const auto words =
        philox({{static_cast<uint32_t>(i), key.first, key.second, key.third}},
               static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
    const auto wide = uint64_t{words.word[0]} << 32 | words.word[1];
    const auto other = i + static_cast<int64_t>(wide % static_cast<uint64_t>(n - i));
    std::swap(order[static_cast<size_t>(i)], order[static_cast<size_t>(other)]);
  }
  order.resize(static_cast<size_t>(count));
  return order;
}

}  // namespace budwood::kernels
