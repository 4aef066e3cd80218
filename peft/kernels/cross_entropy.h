#pragma once

#include <budwood/quant/kernels/gemm.h>

#include <cstdint>

namespace budwood::kernels {

struct CrossEntropyOptions {
  float label_smoothing = 0.0f;    ///< share of the target spread over all classes
  float z_loss = 0.0f;             ///< weight of logsumexp squared (PaLM, arXiv 2204.02311)
  const float* weights = nullptr;  ///< of each row; null = 1
  bool gradient = false;           ///< writes the gradient of the sum of losses over the logits
};

/// losses[i] = w ((1 - e) (lse - x[label]) + e (lse - mean(x)) + z lse^2) for n rows of logits over
/// `classes`, e the smoothing, in fp32 arithmetic. A row whose label is negative counts nothing:
/// loss 0, gradient 0. Labels are below `classes`.
void cross_entropy(const quant::kernels::MutableFloatRows& logits, int64_t n, int64_t classes,
                   const int64_t* labels, const CrossEntropyOptions& options, float* losses,
                   const quant::kernels::Threads& threads);

}  // namespace budwood::kernels
