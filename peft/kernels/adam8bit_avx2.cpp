#include <budwood/peft/kernels/adam8bit_loops.h>

namespace budwood::kernels {

extern const Adam8bitPath kAdam8bitAvx2 = kAdam8bitPath;

}  // namespace budwood::kernels
