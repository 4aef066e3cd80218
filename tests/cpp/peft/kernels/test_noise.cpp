#include <budwood/peft/kernels/noise.h>
#include <budwood/quant/kernels/isa.h>
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "kernel_cases.h"

using namespace budwood::kernels;

TEST_CASE("Philox gives the words that its authors published") {
  const auto zero = philox({{0, 0, 0, 0}}, 0, 0);
  CHECK(zero.word[0] == 0x6627e8d5u);
  CHECK(zero.word[1] == 0xe169c58du);
  CHECK(zero.word[2] == 0xbc57ac4cu);
  CHECK(zero.word[3] == 0x9b00dbd8u);
  const auto pi =
      philox({{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}}, 0xa4093822u, 0x299f31d0u);
  CHECK(pi.word[0] == 0xd16cfe09u);
  CHECK(pi.word[1] == 0x94fdccebu);
  CHECK(pi.word[2] == 0x5001e420u);
  CHECK(pi.word[3] == 0x24126ea1u);
}

TEST_CASE("normal numbers are Box and Muller's of those words, in fp64 to 1e-6") {
  const NoiseKey key{.seed = 0x123456789abcdefull, .step = 7, .stream = 3};
  std::vector<float> z(4096);
  normal(key, 1000, 4096, z.data());
  double worst = 0;
  for (uint64_t i = 1000; i < 1000 + 4096; ++i) {
    const auto words =
        philox({{static_cast<uint32_t>(i / 4), 0, key.stream, key.step}},
               static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
    const auto pair = i % 4 / 2 * 2;
    const double u = ((words.word[pair] >> 9) + 0.5) / (1 << 23);
    const double turn = 2 * std::numbers::pi * ((words.word[pair + 1] >> 9) + 0.5) / (1 << 23);
    const double wanted = std::sqrt(-2 * std::log(u)) * (i % 2 ? std::sin(turn) : std::cos(turn));
    worst = std::max(worst, std::abs(wanted - z[i - 1000]) / std::max(1.0, std::abs(wanted)));
  }
  CHECK(worst < 1e-6);
}

TEST_CASE("any part of a sequence is the same, and so are the bits of every instruction set") {
  const NoiseKey key{.seed = 11, .step = 1, .stream = 2};
  std::vector<float> whole(1500), part(700);
  normal(key, 0, 1500, whole.data());
  for (const uint64_t begin : {0, 1, 5, 255, 256, 257, 777}) {
    normal(key, begin, 700, part.data());
    CHECK(std::equal(part.begin(), part.end(), whole.begin() + static_cast<long>(begin)));
  }
  kernel_cases::on_each_isa([&] {
    std::vector<float> own(1500);
    normal(key, 0, 1500, own.data());
    CHECK(own == whole);
  });
}

TEST_CASE("moments and the independence of neighbouring sequences are those of a normal") {
  constexpr int64_t n = 1 << 20;
  std::vector<float> a(n), b(n);
  normal({.seed = 1, .step = 5, .stream = 0}, 0, n, a.data());
  normal({.seed = 1, .step = 5, .stream = 1}, 0, n, b.data());
  double mean = 0, square = 0, fourth = 0, both = 0, lag = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double x = a[static_cast<size_t>(i)];
    mean += x, square += x * x, fourth += x * x * x * x, both += x * b[static_cast<size_t>(i)];
    if (i > 0) lag += x * a[static_cast<size_t>(i - 1)];
  }
  const double noise = 1 / std::sqrt(double{n});
  CHECK(std::abs(mean / n) < 4 * noise);
  CHECK(std::abs(square / n - 1) < 4 * std::sqrt(2.0) * noise);
  CHECK(std::abs(fourth / n - 3) < 4 * std::sqrt(96.0) * noise);
  CHECK(std::abs(both / n) < 4 * noise);
  CHECK(std::abs(lag / n) < 4 * noise);
}
