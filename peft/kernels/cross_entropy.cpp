#include <budwood/peft/kernels/cross_entropy.h>
#include <budwood/peft/kernels/cross_entropy_paths.h>
#include <budwood/peft/kernels/scratch.h>
#include <budwood/quant/kernels/isa.h>

#include <algorithm>
#include <cmath>

namespace budwood::kernels {
namespace {

using quant::kernels::FloatType;

// The loss of one row of floats, which becomes its gradient where that is wanted.
float row_loss(const CrossEntropyPath& loops, float* x, int64_t classes, int64_t label,
               float weight, const CrossEntropyOptions& options) {
  const float smoothing = options.label_smoothing;
  const float at_label = x[label];
  const float mean = smoothing > 0.0f ? loops.sum(x, classes) / static_cast<float>(classes) : 0.0f;
  const float most = loops.largest(x, classes);
  // Every logit -inf, or NaN: nothing is subtracted, so that the sum tells.
  const float shift = std::isfinite(most) ? most : 0.0f;
  const float total = loops.sum_of_exp(x, shift, classes, options.gradient);
  const float log_total = std::log(total);
  const float lse = shift + log_total;
  // Differences of logits first: they are small where the logits are not.
  float loss = (1.0f - smoothing) * (shift - at_label + log_total);
  if (smoothing > 0.0f) loss += smoothing * (shift - mean + log_total);
  if (options.z_loss > 0.0f) loss += options.z_loss * lse * lse;
  if (options.gradient) {
    loops.affine(x, weight * (1.0f + 2.0f * options.z_loss * lse) / total,
                 weight * smoothing / static_cast<float>(classes), classes);
    x[label] -= weight * (1.0f - smoothing);
  }
  return weight * loss;
}

}  // namespace

void cross_entropy(const quant::kernels::MutableFloatRows& logits, int64_t n, int64_t classes,
                   const int64_t* labels, const CrossEntropyOptions& options, float* losses,
                   const quant::kernels::Threads& threads) {
  const auto& loops =
      quant::kernels::active_path(kCrossEntropyScalar, kCrossEntropyAvx2, kCrossEntropyAvx512);
  const bool copy = logits.type != FloatType::fp32;
  quant::kernels::gemm::hand_out(threads, n, n * classes * 8, [&] {
    float* buffer = scratch().floats(copy ? classes : 16);
    return [&, buffer](int64_t row) {
      void* stored = quant::kernels::gemm::place(logits, row, 0);
      if (labels[row] < 0) {
        losses[row] = 0.0f;
        const auto bytes = static_cast<size_t>(classes * float_bytes(logits.type));
        if (options.gradient) std::fill_n(static_cast<char*>(stored), bytes, char{0});
        return;
      }
      if (copy) to_fp32(logits.type, stored, buffer, classes);
      losses[row] = row_loss(loops, copy ? buffer : static_cast<float*>(stored), classes,
                             labels[row], options.weights ? options.weights[row] : 1.0f, options);
      if (copy && options.gradient) fp32_to(logits.type, buffer, stored, classes);
    };
  });
}

}  // namespace budwood::kernels
