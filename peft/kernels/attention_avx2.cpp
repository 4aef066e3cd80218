#include <budwood/peft/kernels/attention_loops.h>

namespace budwood::kernels {

extern const AttentionPath kAttentionAvx2 = kAttentionPath;

}  // namespace budwood::kernels
