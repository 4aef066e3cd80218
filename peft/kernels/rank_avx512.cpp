#include <budwood/peft/kernels/rank_loops.h>

namespace budwood::kernels {

extern const RankPath kRankAvx512 = kRankPath;

}  // namespace budwood::kernels
