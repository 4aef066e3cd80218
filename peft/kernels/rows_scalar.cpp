#include <budwood/peft/kernels/rows_loops.h>

namespace budwood::kernels {

extern const RowsPath kRowsScalar = kRowsPath;

}  // namespace budwood::kernels
