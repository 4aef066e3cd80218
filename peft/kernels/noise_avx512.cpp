#include <budwood/peft/kernels/noise_loops.h>

namespace budwood::kernels {

extern const NoisePath kNoiseAvx512 = kNoisePath;

}  // namespace budwood::kernels
