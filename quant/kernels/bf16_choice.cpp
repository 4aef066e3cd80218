#include <budwood/quant/error.h>
#include <budwood/quant/kernels/bf16_choice.h>
#include <budwood/quant/kernels/gemm_paths.h>
#include <budwood/quant/kernels/isa.h>
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <string_view>
#include <vector>

namespace budwood::quant::kernels {
namespace {

constexpr int kUnset = -1;
std::atomic<int> forced{kUnset};

// Seconds for one row of the same product, small enough for the first cache.
double seconds_of(void (*multiply)(const Tile&), int64_t rows, int64_t k) {
  constexpr int kTimes = 200;
  std::vector<float> a(static_cast<size_t>(rows * k)), b(static_cast<size_t>(kPanelWidth * k));
  std::vector<float> c(static_cast<size_t>(rows * kPanelWidth));
  Tile tile{.rows = rows,
            .width = kPanelWidth,
            .a = a.data(),
            .a_stride = k,
            .b = b.data(),
            .b_stride = kPanelWidth,
            .k = k,
            .c = c.data(),
            .c_stride = kPanelWidth};
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < kTimes; ++i) {
    multiply(tile);
  }
  const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
  return spent.count() / static_cast<double>(rows);
}

// The rates differ by a factor of two or more, so the least of a few runs is beyond doubt.
bool is_faster(const Bf16Path& path) {
  constexpr int64_t kInner = 64;
  double fp32 = 1e9, bf16 = 1e9;
  for (int round = 0; round < 7; ++round) {
    fp32 = std::min(fp32, seconds_of(kGemmAvx512.tile, kTileRows, kInner));
    bf16 = std::min(bf16, seconds_of(path.tile, path.rows, kInner / 2));
  }
  path.release();
  return bf16 < fp32;
}

void require_bf16(const char* where) {
  if (!has_avx512_bf16()) {
    throw Error(where, "bf16 arithmetic asked for, and this processor, or BUDWOOD_ISA, lacks it");
  }
}

}  // namespace

bool multiplies_in_bf16() {
  const int now = forced.load(std::memory_order_relaxed);
  if (now != kUnset) {
    return now != 0 && has_avx512_bf16();
  }
  static const char* const asked = std::getenv("BUDWOOD_BF16");
  const std::string_view choice = asked == nullptr ? "" : asked;
  if (choice == "fp32") {
    return false;
  }
  if (choice == "bf16") {
    require_bf16("BUDWOOD_BF16");
    return true;
  }
  if (!choice.empty()) {
    throw Error("BUDWOOD_BF16", fmt::format("'{}' is no arithmetic; wanted fp32 or bf16", choice));
  }
  if (!has_avx512_bf16()) {
    return false;
  }
  if (has_amx_bf16()) {
    static const bool faster = is_faster(kGemmAmx);
    return faster;
  }
  static const bool faster = is_faster(kGemmBf16);
  return faster;
}

const Bf16Path& bf16_path() {
  return has_amx_bf16() ? kGemmAmx : kGemmBf16;
}

ScopedBf16::ScopedBf16(bool bf16) : previous_(forced.load()) {
  if (bf16) {
    require_bf16("ScopedBf16");
  }
  forced.store(bf16 ? 1 : 0);
}

ScopedBf16::~ScopedBf16() {
  forced.store(previous_);
}

}  // namespace budwood::quant::kernels
