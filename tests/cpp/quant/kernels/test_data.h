#pragma once

#include <budwood/quant/kernels/isa.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace budwood::quant::kernels {

/// Instruction sets of this machine besides scalar.
inline std::vector<Isa> wide_isas() {
  std::vector<Isa> isas;
  for (Isa isa : {Isa::avx2, Isa::avx512, Isa::amx}) {
    if (isa <= best_isa()) {
      isas.push_back(isa);
    }
  }
  return isas;
}

/// All instruction sets of this machine.
inline std::vector<Isa> all_isas() {
  std::vector<Isa> isas = {Isa::scalar};
  for (Isa isa : wide_isas()) {
    isas.push_back(isa);
  }
  return isas;
}

inline std::vector<float> normal_floats(int64_t n, uint32_t seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) {
    value = normal(generator);
  }
  return values;
}

inline std::vector<uint8_t> random_bytes(int64_t n, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<uint8_t> bytes(static_cast<size_t>(n));
  for (uint8_t& byte : bytes) {
    byte = static_cast<uint8_t>(generator());
  }
  return bytes;
}

/// (i - 16) * 3 / 32, i = 0..31.
inline std::vector<float> ramp() {
  std::vector<float> values(32);
  for (int i = 0; i < 32; ++i) {
    values[static_cast<size_t>(i)] = static_cast<float>(i - 16) * 3.0f / 32.0f;
  }
  return values;
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.empty() || b.empty()) {
    return a.empty() && b.empty();
  }
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

/// As same_bits, but any NaN equals any other.
inline bool same_values(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) {
    return false;
  }
  for (size_t i = 0; i < a.size(); ++i) {
    const bool both_nan = std::isnan(a[i]) && std::isnan(b[i]);
    if (!both_nan && std::memcmp(&a[i], &b[i], sizeof(float)) != 0) {
      return false;
    }
  }
  return true;
}

/// "0c 22 81" for the bytes.
inline std::string hex(const std::vector<uint8_t>& bytes) {
  std::string text;
  for (uint8_t byte : bytes) {
    char two[4];
    std::snprintf(two, sizeof two, "%02x", byte);
    text.append(text.empty() ? "" : " ").append(two);
  }
  return text;
}

}  // namespace budwood::quant::kernels
