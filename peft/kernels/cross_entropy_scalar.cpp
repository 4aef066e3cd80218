#include <budwood/peft/kernels/cross_entropy_loops.h>

namespace budwood::kernels {

extern const CrossEntropyPath kCrossEntropyScalar = kCrossEntropyPath;

}  // namespace budwood::kernels
