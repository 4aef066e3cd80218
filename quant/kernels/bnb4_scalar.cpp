#include <budwood/quant/kernels/bnb4_paths.h>
#include <budwood/quant/kernels/half.h>

namespace budwood::quant::kernels {
namespace {

void decode(const Bnb4Table& table, const uint8_t* codes, const float* absmax, int64_t block_size,
            int64_t begin, int64_t n, float* dst) {
  const int64_t end = begin + n;
  for (int64_t i = begin; i < end; ++absmax) {
    const int64_t block_end = (i / block_size + 1) * block_size;
    const int64_t stop = block_end < end ? block_end : end;
    const float scale = *absmax;
    if (i < stop && (i & 1) != 0) {
      *dst++ = table.entries[codes[i / 2] & 15] * scale;
      ++i;
    }
    for (; i + 2 <= stop; i += 2) {
      const uint8_t byte = codes[i / 2];
      *dst++ = table.entries[byte >> 4] * scale;
      *dst++ = table.entries[byte & 15] * scale;
    }
    if (i < stop) {
      *dst++ = table.entries[codes[i / 2] >> 4] * scale;
      ++i;
    }
  }
}

uint32_t largest_magnitude_bits(const float* src, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = float_bits(src[i]) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return most;
}

constexpr uint32_t kInfinity = 0x7f800000u;
constexpr float kLeastAbsmax = 1e-38f;

int32_t code_of(const Bnb4Encoding& encoding, float value) {
  const float v = value > 1.0f ? 1.0f : value < -1.0f ? -1.0f : value;
  int index = 0;
  for (int t = 0; t < 15; ++t) {
    index += encoding.thresholds[t] < v ? 1 : 0;
  }
  return encoding.order[index];
}

bool encode(const Bnb4Encoding& encoding, const float* src, int64_t block_size, uint8_t* codes,
            float* absmax) {
  const uint32_t bits = largest_magnitude_bits(src, block_size);
  if (bits >= kInfinity) {
    return false;
  }
  *absmax = float_from_bits(bits);
  const float inverse = 1.0f / (*absmax > kLeastAbsmax ? *absmax : kLeastAbsmax);
  for (int64_t i = 0; i < block_size; i += 2) {
    const int32_t first = code_of(encoding, src[i] * inverse);
    const int32_t second = code_of(encoding, src[i + 1] * inverse);
    codes[i / 2] = static_cast<uint8_t>(first << 4 | second);
  }
  return true;
}

}  // namespace

bool encode_bnb4_tail(const Bnb4Encoding& encoding, const float* src, int64_t n, uint8_t* codes,
                      float* absmax) {
  const uint32_t bits = largest_magnitude_bits(src, n);
  if (bits >= kInfinity) {
    return false;
  }
  const float most = float_from_bits(bits);
  *absmax = most > kLeastAbsmax ? most : kLeastAbsmax;
  for (int64_t i = 0; i < n; i += 2) {
    const int32_t first = code_of(encoding, src[i] / *absmax);
    const int32_t second = code_of(encoding, i + 1 < n ? src[i + 1] / *absmax : 0.0f);
    codes[i / 2] = static_cast<uint8_t>(first << 4 | second);
  }
  return true;
}

const Bnb4Path kBnb4Scalar = {decode, encode, nullptr};

}  // namespace budwood::quant::kernels
