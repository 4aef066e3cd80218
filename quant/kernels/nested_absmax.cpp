#include <budwood/quant/error.h>
#include <budwood/quant/kernels/bnb4.h>
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>

namespace budwood::quant::kernels {
namespace {

constexpr int64_t kNestedBlock = 256;

struct DynamicMap {
  float values[256];

  // Per decade 10^(i-6) the means of neighbours on a line of 2^i + 1 points from 0.1 to 1, with
  // both signs. The line is built from both ends with fused steps: other roundings move entries by
  // an ulp.
  DynamicMap() {
    constexpr float kDecades[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
    int count = 0;
    for (int i = 0; i < 7; ++i) {
      const int points = (1 << i) + 1;
      const float step = (1.0f - 0.1f) / static_cast<float>(points - 1);
      const auto point = [points, step](int k) {
        return k < points / 2 ? std::fma(step, static_cast<float>(k), 0.1f)
                              : std::fma(-step, static_cast<float>(points - 1 - k), 1.0f);
      };
      for (int k = 0; k + 1 < points; ++k) {
        const float value = (point(k) + point(k + 1)) / 2.0f * kDecades[i];
        values[count++] = value;
        values[count++] = -value;
      }
    }
    values[count++] = 0.0f;
    values[count++] = 1.0f;
    std::sort(values, values + 256);
  }
};

/// Index of the entry nearest to v, the lower of two that are equally near.
uint8_t nearest(const float* map, float v) {
  const int64_t above = std::lower_bound(map, map + 256, v) - map;
  if (above == 0) {
    return 0;
  }
  if (above == 256) {
    return 255;
  }
  // The differences of floats are exact in double here.
  const double up = static_cast<double>(map[above]) - v;
  const double down = static_cast<double>(v) - map[above - 1];
  return static_cast<uint8_t>(down <= up ? above - 1 : above);
}

}  // namespace

const float* dynamic_map() {
  static const DynamicMap map;
  return map.values;
}

QuantizeStatus quantize_absmax(const float* absmax, int64_t blocks, float offset, uint8_t* codes,
                               float* nested) {
  const float* map = dynamic_map();
  for (int64_t i = 0; i < blocks; ++i) {
    if (!std::isfinite(absmax[i])) {
      return {Fault::not_finite, i};
    }
  }
  for (int64_t begin = 0; begin < blocks; begin += kNestedBlock) {
    const int64_t end = std::min(begin + kNestedBlock, blocks);
    float most = 0.0f;
    for (int64_t i = begin; i < end; ++i) {
      most = std::max(most, std::fabs(absmax[i] - offset));
    }
    nested[begin / kNestedBlock] = most;
    const float inverse = 1.0f / most;
    for (int64_t i = begin; i < end; ++i) {
      const float centred = absmax[i] - offset;
      // No inverse of zero or of a subnormal: then every value is the offset's, or next to it.
      const float v = std::isfinite(inverse) ? centred * inverse
                      : most > 0.0f          ? centred / most
                                             : 0.0f;
      codes[i] = nearest(map, v);
    }
  }
  return {};
}

void dequantize_absmax(const NestedAbsmax& nested, int64_t begin, int64_t n, float* dst) {
  if (nested.codes == nullptr || nested.map == nullptr || nested.absmax == nullptr ||
      nested.block_size < 1) {
    throw Error(
        "dequantize_absmax",
        fmt::format("codes, map and absmax must be set and the block size positive; it is {}",
                    nested.block_size));
  }
  // Divisions are slow beside the few values that are asked for.
  const auto size = static_cast<uint64_t>(nested.block_size);
  int64_t outer =
      std::has_single_bit(size) ? begin >> std::countr_zero(size) : begin / nested.block_size;
  for (int64_t block = begin; block < begin + n; ++outer) {
    const int64_t stop = std::min(begin + n, (outer + 1) * nested.block_size);
    for (; block < stop; ++block) {
      dst[block - begin] = nested.map[nested.codes[block]] * nested.absmax[outer] + nested.offset;
    }
  }
}

}  // namespace budwood::quant::kernels
