#include <budwood/peft/kernels/rank_loops.h>

namespace budwood::kernels {

extern const RankPath kRankAvx2 = kRankPath;

}  // namespace budwood::kernels
