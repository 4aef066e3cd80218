#include <budwood/quant/kernels/int8.h>
#include <budwood/quant/kernels/int8_paths.h>
#include <budwood/quant/kernels/isa.h>

#include <algorithm>
#include <cmath>

namespace budwood::quant::kernels {
namespace {

int32_t largest_magnitude(const float* src, int64_t n) {
  int32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    most = std::max(most, static_cast<int32_t>(float_bits(src[i]) & 0x7fffffffu));
  }
  return most;
}

void encode(const float* src, float scale, int64_t n, int8_t* codes) {
  for (int64_t i = 0; i < n; ++i) {
    codes[i] = static_cast<int8_t>(std::nearbyint(src[i] * scale));
  }
}

void decode(const int8_t* codes, float scb, float last, int64_t n, float* dst) {
  for (int64_t i = 0; i < n; ++i) {
    dst[i] = static_cast<float>(codes[i]) * scb * last;
  }
}

const Int8Path& path() {
  return active_path(kInt8Scalar, kInt8Avx2, kInt8Avx512);
}

}  // namespace

const Int8Path kInt8Scalar = {largest_magnitude, encode, decode};

QuantizeStatus quantize_int8_row(const float* src, int64_t n, int8_t* codes, float* scb) {
  const int32_t bits = path().largest_magnitude(src, n);
  if (bits >= 0x7f800000) {
    const float* bad = std::find_if(src, src + n, [](float v) { return !std::isfinite(v); });
    return {Fault::not_finite, bad - src};
  }
  *scb = float_from_bits(static_cast<uint32_t>(bits));
  // Not 127 / scb: torch divides a number by a tensor this way, and ties depend on it.
  const float scale = 1.0f / *scb * 127.0f;
  if (std::isfinite(scale)) {
    path().encode(src, scale, n, codes);
    return {};
  }
  // A row of zeros, or of values so small that the scale overflows.
  for (int64_t i = 0; i < n; ++i) {
    codes[i] = *scb == 0.0f ? 0 : static_cast<int8_t>(std::nearbyint(src[i] / *scb * 127.0f));
  }
  return {};
}

void dequantize_int8_row(const int8_t* codes, float scb, int64_t n, FloatType out, void* dst) {
  const float last = float_from_bits(0x3c010204u);  // fp32(1/127)
  const auto decode_row = path().decode;
  if (out == FloatType::fp32) {
    return decode_row(codes, scb, last, n, static_cast<float*>(dst));
  }
  constexpr int64_t kChunk = 1024;
  float values[kChunk];
  for (int64_t i = 0; i < n; i += kChunk) {
    const int64_t here = std::min(n - i, kChunk);
    decode_row(codes + i, scb, last, here, values);
    fp32_to(out, values, static_cast<char*>(dst) + i * float_bytes(out), here);
  }
}

}  // namespace budwood::quant::kernels
