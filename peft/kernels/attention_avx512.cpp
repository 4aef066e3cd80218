#include <budwood/peft/kernels/attention_loops.h>

namespace budwood::kernels {

extern const AttentionPath kAttentionAvx512 = kAttentionPath;

}  // namespace budwood::kernels
