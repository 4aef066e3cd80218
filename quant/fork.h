#pragma once

namespace budwood::quant {

/// Called before threads compute. OpenMP's threads do not come along into a child of fork, where
/// the next parallel loop, torch's own as well, would wait for them forever. From the first call
/// on, a child computes with one thread.
void prepare_for_fork();

}  // namespace budwood::quant
