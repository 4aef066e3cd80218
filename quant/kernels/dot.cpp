#include <budwood/quant/kernels/dot.h>
#include <budwood/quant/kernels/dot_paths.h>
#include <budwood/quant/kernels/isa.h>

namespace budwood::quant::kernels {
namespace {

void accumulate(const float* w, const float* x, int64_t n, float* lanes) {
  for (int64_t i = 0; i < n; i += kDotLanes) {
    for (int64_t lane = 0; lane < kDotLanes; ++lane) {
      lanes[lane] += w[i + lane] * x[i + lane];
    }
  }
}

}  // namespace

const DotPath kDotScalar = {accumulate};

void dot_rows(const float* w, const float* x, int64_t n, int64_t tokens, float* y, int64_t stride) {
  const auto& path = active_path(kDotScalar, kDotAvx2, kDotAvx512);
  const int64_t whole = n / kDotLanes * kDotLanes;
  for (int64_t t = 0; t < tokens; ++t, x += n) {
    float lanes[kDotLanes] = {};
    path.accumulate(w, x, whole, lanes);
    for (int64_t i = whole; i < n; ++i) {
      lanes[i - whole] += w[i] * x[i];
    }
    for (int64_t half = kDotLanes / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) {
        lanes[lane] += lanes[lane + half];
      }
    }
    y[t * stride] = lanes[0];
  }
}

}  // namespace budwood::quant::kernels
