#include <budwood/peft/kernels/fold_loops.h>

namespace budwood::kernels {

extern const FoldPath kFoldAvx512 = kFoldPath;

}  // namespace budwood::kernels
