#include <budwood/peft/kernels/fold_loops.h>

namespace budwood::kernels {

extern const FoldPath kFoldScalar = kFoldPath;

}  // namespace budwood::kernels
