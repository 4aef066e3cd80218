#include <budwood/quant/kernels/gguf_blocks_paths.h>
#include <budwood/quant/kernels/half.h>

namespace budwood::quant::kernels {
namespace {

constexpr int32_t kInfinity = 0x7f800000;

int32_t magnitude_bits(float value) {
  return static_cast<int32_t>(float_bits(value) & 0x7fffffffu);
}

/// 1/d, or 0 where there is nothing to scale: d = 0, or so small that the inverse overflows.
float inverse(float d) {
  const float id = d == 0.0f ? 0.0f : 1.0f / d;
  return magnitude_bits(id) == kInfinity ? 0.0f : id;
}

bool store_fp16(float value, uint8_t* dst) {
  const uint16_t half = fp32_to_fp16(value);
  std::memcpy(dst, &half, sizeof half);
  return (half & 0x7c00u) != 0x7c00u;
}

int clamp_code(float shifted, int most) {
  const int q = static_cast<int>(shifted);
  return q < 0 ? 0 : q > most ? most : q;
}

bool encode_q4_0(const float* src, uint8_t* dst) {
  float most = 0.0f;
  int32_t bits = 0;
  for (int j = 0; j < 32; ++j) {
    if (magnitude_bits(src[j]) > bits) {
      bits = magnitude_bits(src[j]);
      most = src[j];
    }
  }
  const float d = most / -8.0f;
  if (bits >= kInfinity || !store_fp16(d, dst)) {
    return false;
  }
  const float id = inverse(d);
  // Where the inverse overflowed, ggml's conversion of infinity gives code 0 (on x86-64).
  const float shift = id == 0.0f && d != 0.0f ? 0.0f : 8.5f;
  for (int j = 0; j < 16; ++j) {
    const int low = clamp_code(src[j] * id + shift, 15);
    const int high = clamp_code(src[j + 16] * id + shift, 15);
    dst[2 + j] = static_cast<uint8_t>(low | high << 4);
  }
  return true;
}

bool encode_q4_1(const float* src, uint8_t* dst) {
  float least = src[0];
  float most = src[0];
  int32_t bits = 0;
  for (int j = 0; j < 32; ++j) {
    bits = magnitude_bits(src[j]) > bits ? magnitude_bits(src[j]) : bits;
    least = src[j] < least ? src[j] : least;
    most = src[j] > most ? src[j] : most;
  }
  const float d = (most - least) / 15.0f;
  if (bits >= kInfinity || !store_fp16(d, dst) || !store_fp16(least, dst + 2)) {
    return false;
  }
  const float id = inverse(d);
  for (int j = 0; j < 16; ++j) {
    const int low = clamp_code((src[j] - least) * id + 0.5f, 15);
    const int high = clamp_code((src[j + 16] - least) * id + 0.5f, 15);
    dst[4 + j] = static_cast<uint8_t>(low | high << 4);
  }
  return true;
}

bool encode_q8_0(const float* src, uint8_t* dst) {
  int32_t bits = 0;
  for (int j = 0; j < 32; ++j) {
    bits = magnitude_bits(src[j]) > bits ? magnitude_bits(src[j]) : bits;
  }
  const float d = float_from_bits(static_cast<uint32_t>(bits)) / 127.0f;
  if (bits >= kInfinity || !store_fp16(d, dst)) {
    return false;
  }
  const float id = inverse(d);
  for (int j = 0; j < 32; ++j) {
    // Half away from zero; the difference to the truncated value is exact.
    const float scaled = src[j] * id;
    int q = static_cast<int>(scaled);
    const float rest = scaled - static_cast<float>(q);
    q += rest >= 0.5f ? 1 : rest <= -0.5f ? -1 : 0;
    dst[2 + j] = static_cast<uint8_t>(q);
  }
  return true;
}

}  // namespace

const GgufEncoders kGgufEncodeScalar = {encode_q4_0, encode_q4_1, encode_q8_0};

}  // namespace budwood::quant::kernels
