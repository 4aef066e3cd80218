#include <budwood/peft/kernels/adam8bit_paths.h>
#include <budwood/quant/kernels/isa.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

namespace budwood::kernels {
namespace {

std::array<float, 256> make_map(bool with_sign) {
  std::vector<float> values = {0.0f, 1.0f};
  for (int decade = 0; decade < 7; ++decade) {
    const int count = 1 << (with_sign ? decade : decade + 1);
    const double unit = std::pow(10.0, decade - 6), width = 0.9 / count;
    for (int i = 0; i < count; ++i) {
      const auto value = static_cast<float>((0.1 + width * (i + 0.5)) * unit);
      values.push_back(value);
      if (with_sign) values.push_back(-value);
    }
  }
  std::sort(values.begin(), values.end());
  std::array<float, 256> map{};
  std::copy(values.begin(), values.end(), map.begin());
  return map;
}

/// Nearest codes by the upper half of a float's bits: the numbers that share one have at most one
/// border between two codes among them.
struct Codes {
  std::array<float, 256> map;
  std::array<float, 256> border;  // between code i and code i + 1
  std::vector<uint8_t> first;     // the code of the smallest number with these upper bits

  explicit Codes(bool with_sign) : map(make_map(with_sign)), first(1 << 16) {
    for (size_t i = 0; i < 255; ++i) border[i] = 0.5f * (map[i] + map[i + 1]);
    border[255] = std::numeric_limits<float>::infinity();
    for (uint32_t top = 0; top < first.size(); ++top) {
      // Of negative numbers the one with all lower bits set is the smallest.
      const uint32_t bits = top << 16 | (top & 0x8000u ? 0xffffu : 0);
      const float least = std::bit_cast<float>(bits);
      if (std::isnan(least)) continue;
      const auto at = std::lower_bound(border.begin(), border.end() - 1, least);
      first[top] = static_cast<uint8_t>(at - border.begin());
    }
  }

  uint8_t operator()(float x) const {
    const uint8_t code = first[std::bit_cast<uint32_t>(x) >> 16];
    return static_cast<uint8_t>(code + (x > border[code] ? 1 : 0));
  }
};

const Codes& codes(bool with_sign) {
  static const Codes with(true), without(false);
  return with_sign ? with : without;
}

// Blocks whose largest magnitude has no inverse in fp32 are zeros.
float inverse(float most) {
  return most >= 1e-37f ? 1.0f / most : 0.0f;
}

void encode_block(bool with_sign, const float* values, int64_t n, float most, uint8_t* to,
                  float* scale) {
  const auto& table = codes(with_sign);
  const float factor = inverse(most);
  *scale = factor > 0 ? most : 0.0f;
  if (with_sign) {
    for (int64_t i = 0; i < n; ++i) to[i] = table(values[i] * factor);
    return;
  }
  const uint8_t least = factor > 0 ? 1 : 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint8_t code = table(values[i] * factor);
    to[i] = values[i] > 0 ? std::max(code, least) : code;
  }
}

void decode_block(bool with_sign, const uint8_t* from, int64_t n, float scale, float* values) {
  const auto& map = codes(with_sign).map;
  for (int64_t i = 0; i < n; ++i) values[i] = map[from[i]] * scale;
}

}  // namespace

const std::array<float, 256>& dynamic_map(bool with_sign) {
  return codes(with_sign).map;
}

void adamw_8bit(const Adam8bitStep& step, int64_t block, int64_t begin, int64_t n, float* p,
                const float* g, CodedMoment first, CodedMoment second) {
  const auto& path = quant::kernels::active_path(kAdam8bitScalar, kAdam8bitAvx2, kAdam8bitAvx512);
  alignas(64) float m[kLargestAdamBlock], v[kLargestAdamBlock];
  for (int64_t at = begin; at < begin + n; at += block) {
    const int64_t count = std::min(block, begin + n - at), b = at / block;
    decode_block(true, first.codes + at, count, first.scales[b], m);
    decode_block(false, second.codes + at, count, second.scales[b], v);
    float most_m = 0, most_v = 0;
    path.update(step, count, p + at, g + at, m, v, &most_m, &most_v);
    encode_block(true, m, count, most_m, first.codes + at, first.scales + b);
    encode_block(false, v, count, most_v, second.codes + at, second.scales + b);
  }
}

void encode_moment(bool with_sign, int64_t block, const float* values, int64_t n,
                   CodedMoment moment) {
  for (int64_t at = 0; at < n; at += block) {
    const int64_t count = std::min(block, n - at);
    float most = 0;
    for (int64_t i = at; i < at + count; ++i) most = std::max(most, std::abs(values[i]));
    encode_block(with_sign, values + at, count, most, moment.codes + at,
                 moment.scales + at / block);
  }
}

void decode_moment(bool with_sign, int64_t block, CodedMoment moment, int64_t n, float* values) {
  for (int64_t at = 0; at < n; at += block)
    decode_block(with_sign, moment.codes + at, std::min(block, n - at), moment.scales[at / block],
                 values + at);
}

}  // namespace budwood::kernels
