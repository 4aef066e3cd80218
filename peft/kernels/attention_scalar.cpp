#include <budwood/peft/kernels/attention_loops.h>

namespace budwood::kernels {

extern const AttentionPath kAttentionScalar = kAttentionPath;

}  // namespace budwood::kernels
