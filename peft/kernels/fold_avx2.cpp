#include <budwood/peft/kernels/fold_loops.h>

namespace budwood::kernels {

extern const FoldPath kFoldAvx2 = kFoldPath;

}  // namespace budwood::kernels
