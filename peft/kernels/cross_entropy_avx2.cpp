#include <budwood/peft/kernels/cross_entropy_loops.h>

namespace budwood::kernels {

extern const CrossEntropyPath kCrossEntropyAvx2 = kCrossEntropyPath;

}  // namespace budwood::kernels
