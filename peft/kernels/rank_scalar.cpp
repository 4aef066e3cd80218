#include <budwood/peft/kernels/rank_loops.h>

namespace budwood::kernels {

extern const RankPath kRankScalar = kRankPath;

}  // namespace budwood::kernels
