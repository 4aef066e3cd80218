#include <budwood/peft/kernels/rows_loops.h>

namespace budwood::kernels {

extern const RowsPath kRowsAvx2 = kRowsPath;

}  // namespace budwood::kernels
