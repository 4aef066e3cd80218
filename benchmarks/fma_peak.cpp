// What the machine's cores do at most: fp32 fused multiply-adds on registers, for each instruction
// set that it has.
//   fma_peak THREADS
// Prints {"avx2": GFLOP/s, "avx512": GFLOP/s}, the best of five tries with that many threads.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int kSums = 12, kTimes = 1 << 22;  // enough sums to hide the latency of two units

// Returns a value that depends on all of them, so that none is left out.
__attribute__((target("avx2,fma"))) float run_avx2() {
  __m256 sum[kSums];
  for (int i = 0; i < kSums; ++i) sum[i] = _mm256_set1_ps(static_cast<float>(i));
  const __m256 a = _mm256_set1_ps(0.999F), b = _mm256_set1_ps(0.001F);
  for (int t = 0; t < kTimes; ++t) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sum[i] = _mm256_fmadd_ps(sum[i], a, b);
  }
  for (int i = 1; i < kSums; ++i) sum[0] = _mm256_add_ps(sum[0], sum[i]);
  return _mm256_cvtss_f32(sum[0]);
}

__attribute__((target("avx512f"))) float run_avx512() {
  __m512 sum[kSums];
  for (int i = 0; i < kSums; ++i) sum[i] = _mm512_set1_ps(static_cast<float>(i));
  const __m512 a = _mm512_set1_ps(0.999F), b = _mm512_set1_ps(0.001F);
  for (int t = 0; t < kTimes; ++t) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sum[i] = _mm512_fmadd_ps(sum[i], a, b);
  }
  for (int i = 1; i < kSums; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
  return _mm512_cvtss_f32(sum[0]);
}

double peak(float (*run)(), int lanes, int threads) {
  double best = 0;
  std::vector<float> results(static_cast<size_t>(threads));
  for (int round = 0; round < 5; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    std::vector<std::thread> team;
    for (int t = 0; t < threads; ++t)
      team.emplace_back([&, t] { results[static_cast<size_t>(t)] = run(); });
    for (auto& thread : team) thread.join();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    best = std::max(best, 2.0 * kSums * kTimes * lanes * threads / took.count() / 1e9);
  }
  return results[0] >= 0 ? best : 0;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  nlohmann::json found = nlohmann::json::object();
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found["avx2"] = peak(run_avx2, 8, threads);
  if (__builtin_cpu_supports("avx512f")) found["avx512"] = peak(run_avx512, 16, threads);
  std::cout << found.dump() << "\n";
}
