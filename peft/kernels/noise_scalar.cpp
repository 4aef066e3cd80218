#include <budwood/peft/kernels/noise_loops.h>

namespace budwood::kernels {

extern const NoisePath kNoiseScalar = kNoisePath;

}  // namespace budwood::kernels
