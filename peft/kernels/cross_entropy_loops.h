#pragma once

#include <budwood/peft/kernels/cross_entropy_paths.h>
#include <budwood/peft/kernels/lanes.h>

/// The text of the inner loops of cross_entropy.h.
namespace budwood::kernels {
namespace {

constexpr int64_t kStep = 4 * kLanes;

float largest_of_row(const float* x, int64_t n) {
  Floats most[4] = {all(-kInfinity), all(-kInfinity), all(-kInfinity), all(-kInfinity)};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int c = 0; c < 4; ++c) most[c] = larger(most[c], load(x + i + c * kLanes));
  float result = largest(larger(larger(most[0], most[1]), larger(most[2], most[3])));
  for (; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

float sum_of_exp_row(float* x, float shift, int64_t n, bool keep) {
  Floats sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    for (int c = 0; c < 2; ++c) {
      const Floats e = exp(load(x + i + c * kLanes) - shift);
      sums[c] += e;
      if (keep) store(x + i + c * kLanes, e);
    }
  float total = sum(sums[0] + sums[1]);
  for (; i < n; ++i) {
    const float e = exp(all(x[i] - shift))[0];
    total += e;
    if (keep) x[i] = e;
  }
  return total;
}

float sum_of_row(const float* x, int64_t n) {
  Floats sums[4] = {};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int c = 0; c < 4; ++c) sums[c] += load(x + i + c * kLanes);
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) total += x[i];
  return total;
}

void affine_logits(float* x, float scale, float shift, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, load(x + i) * scale - shift);
  for (; i < n; ++i) x[i] = x[i] * scale - shift;
}

constexpr CrossEntropyPath kCrossEntropyPath = {largest_of_row, sum_of_exp_row, sum_of_row,
                                                affine_logits};

}  // namespace
}  // namespace budwood::kernels
