#pragma once

#include <cstdint>

/// Memory of CPU tensors that is handed out again instead of given back to the system. A training
/// step asks for the same sizes again and again: without a pool every step faults its pages in anew
/// and the heap grows by what lies between blocks in use (measured: 7 % of a step's time, 15 % of
/// its memory).
namespace budwood::quant {

/// While one lives, CPU tensors of the whole process that are larger than 64 KB come from the pool.
/// They stay valid after it. Free and used blocks together never exceed the most that was in use at
/// one time; when the last of several nested pools ends, free blocks go back to the system.
class MemoryPool {
 public:
  MemoryPool();
  ~MemoryPool();
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;
};

/// Gives free memory of the heap back to the system, where the C library can: after work that
/// allocated and freed large pieces between small ones that stay.
void trim_heap();
/// The same once 32 MB were freed in such pieces, by all callers together.
void trim_heap_after(int64_t freed_bytes);

struct MemoryPoolStatistics {
  int64_t used = 0;  ///< bytes of blocks in use
  int64_t free = 0;  ///< bytes of blocks that wait
  int64_t peak = 0;  ///< the most that was in use since the outermost pool began
};
MemoryPoolStatistics memory_pool_statistics();

}  // namespace budwood::quant
