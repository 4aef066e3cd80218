#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <malloc.h>
#include <pthread.h>
#include <sys/mman.h>

#include <budwood/quant/memory_pool.h>
#include <algorithm>
#include <atomic>
#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

namespace budwood::quant {
namespace {

// Smaller tensors are the heap's.
constexpr size_t kLeast = size_t{64} << 10;

size_t rounded(size_t bytes) {
  const size_t step = bytes < (size_t{1} << 20) ? size_t{4} << 10 : size_t{64} << 10;
  return (bytes + step - 1) / step * step;
}

class Pool final : public c10::Allocator {
 public:
  static Pool& instance() {
    // Never destroyed: tensors in static variables give their memory back at the very end.
    static auto* const pool = new Pool;
    return *pool;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kLeast) return heap_->allocate(bytes);
    void* const data = take(rounded(bytes));
    return {data, data, &give_back, c10::DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t count) const override {
    std::memcpy(to, from, count);
  }

  void begin() {
    const std::lock_guard lock(mutex_);
    if (scopes_++ > 0) return;
    heap_ = c10::GetCPUAllocator();
    peak_ = used_;
    c10::SetCPUAllocator(this);
  }

  void end() {
    const std::lock_guard lock(mutex_);
    if (--scopes_ > 0) return;
    // Somebody else may have set another one since.
    if (c10::GetCPUAllocator() == this) c10::SetCPUAllocator(heap_);
    shrink(0);
  }

  MemoryPoolStatistics statistics() {
    const std::lock_guard lock(mutex_);
    return {static_cast<int64_t>(used_), static_cast<int64_t>(free_), static_cast<int64_t>(peak_)};
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  using Blocks = std::list<Block>;  // free ones, the longest free first

  // A child of fork() must find the pool unlocked.
  Pool() {
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  static void give_back(void* data) {
    if (data != nullptr) instance().put(data);
  }

  void* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    const auto fits = by_size_.lower_bound(bytes);
    if (fits != by_size_.end() && fits->first <= bytes + bytes / 8) {
      const Block block = *fits->second;
      forget(fits);
      return use(block);
    }
    peak_ = std::max(peak_, used_ + bytes);
    shrink(peak_ - used_ - bytes);
    void* const data =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    return use({data, bytes});
  }

  void* use(const Block& block) {
    sizes_[block.data] = block.bytes;
    used_ += block.bytes;
    peak_ = std::max(peak_, used_);
    return block.data;
  }

  void put(void* data) {
    const std::lock_guard lock(mutex_);
    const auto known = sizes_.find(data);
    if (known == sizes_.end()) return c10::free_cpu(data);
    const Block block{data, known->second};
    sizes_.erase(known);
    used_ -= block.bytes;
    if (scopes_ == 0) {
      munmap(block.data, block.bytes);
      return;
    }
    blocks_.push_back(block);
    by_size_.emplace(block.bytes, std::prev(blocks_.end()));
    free_ += block.bytes;
  }

  void forget(std::multimap<size_t, Blocks::iterator>::iterator entry) {
    free_ -= entry->first;
    blocks_.erase(entry->second);
    by_size_.erase(entry);
  }

  // Gives the oldest free blocks back until no more than so many bytes are free.
  void shrink(size_t bytes) {
    while (free_ > bytes) {
      const Block block = blocks_.front();
      auto entry = by_size_.lower_bound(block.bytes);
      while (entry->second != blocks_.begin()) ++entry;
      forget(entry);
      munmap(block.data, block.bytes);
    }
  }

  std::mutex mutex_;
  c10::Allocator* heap_ = nullptr;
  int scopes_ = 0;
  std::unordered_map<void*, size_t> sizes_;  // of blocks in use
  Blocks blocks_;
  std::multimap<size_t, Blocks::iterator> by_size_;
  size_t used_ = 0, free_ = 0, peak_ = 0;
};

}  // namespace

MemoryPool::MemoryPool() {
  Pool::instance().begin();
}

MemoryPool::~MemoryPool() {
  Pool::instance().end();
}

void trim_heap() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

void trim_heap_after(int64_t freed_bytes) {
  constexpr int64_t kEnough = int64_t{32} << 20;
  static std::atomic<int64_t> freed{0};
  if ((freed += freed_bytes) < kEnough) return;
  freed = 0;
  trim_heap();
}

MemoryPoolStatistics memory_pool_statistics() {
  return Pool::instance().statistics();
}

}  // namespace budwood::quant
