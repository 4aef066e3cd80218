#include <budwood/peft/kernels/rows_loops.h>

namespace budwood::kernels {

extern const RowsPath kRowsAvx512 = kRowsPath;

}  // namespace budwood::kernels
