#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace budwood {

/// Makes pieces 0 ... count - 1 on `jobs` threads and uses each of them, in order, on the calling
/// one. No more than two pieces for each thread wait to be used. The first exception ends it all
/// and is thrown again.
template <class Piece>
void run_in_order(int64_t count, int jobs, const std::function<Piece(int64_t)>& make,
                  const std::function<void(int64_t, Piece)>& use) {
  if (jobs <= 1) {
    for (int64_t i = 0; i < count; ++i) use(i, make(i));
    return;
  }
  std::mutex mutex;
  std::condition_variable changed;
  std::map<int64_t, Piece> made;
  std::exception_ptr failure;
  int64_t next = 0, used = 0;
  const auto work = [&] {
    std::unique_lock lock(mutex);
    while (true) {
      changed.wait(lock, [&] { return failure || next >= count || next < used + 2 * jobs; });
      if (failure || next >= count) return;
      const int64_t mine = next++;
      lock.unlock();
      try {
        auto piece = make(mine);
        lock.lock();
        made.emplace(mine, std::move(piece));
      } catch (...) {
        if (!lock.owns_lock()) lock.lock();
        if (!failure) failure = std::current_exception();
      }
      changed.notify_all();
    }
  };
  std::vector<std::jthread> threads;
  for (int i = 0; i < jobs; ++i) threads.emplace_back(work);
  for (; used < count;) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return failure || made.contains(used); });
    if (failure) break;
    auto piece = std::move(made.extract(used).mapped());
    lock.unlock();
    try {
      use(used, std::move(piece));
    } catch (...) {
      lock.lock();
      if (!failure) failure = std::current_exception();
      changed.notify_all();
      break;
    }
    lock.lock();
    ++used;
    changed.notify_all();
  }
  threads.clear();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace budwood
