#include <ATen/ATen.h>
#include <sys/wait.h>
#include <unistd.h>

#include <budwood/quant/memory_pool.h>

#include <thread>

// Behind torch, whose logging defines CHECK too.
#include <doctest/doctest.h>

using budwood::quant::memory_pool_statistics;
using budwood::quant::MemoryPool;

namespace {

constexpr int64_t kMega = 1 << 18;  // floats of a megabyte

at::Tensor block(int64_t megabytes, float value) {
  return at::full({megabytes * kMega}, value);
}

}  // namespace

TEST_CASE("a freed block is handed out again, to what has about its size") {
  const MemoryPool pool;
  block(16, 0.0f);  // so that what follows stays below the peak, and nothing is given back
  const void* first = nullptr;
  {
    const auto a = block(4, 1.0f);
    first = a.data_ptr();
    CHECK(memory_pool_statistics().used == 4 << 20);
  }
  CHECK(memory_pool_statistics().free == 4 << 20);
  const auto much_smaller = block(1, 2.0f);
  CHECK(much_smaller.data_ptr() != first);
  const auto again = at::zeros({4 * kMega - 1000});
  CHECK(again.data_ptr() == first);
  CHECK(again.sum().item<float>() == 0);
}

TEST_CASE("free and used blocks never exceed the most that was in use") {
  const MemoryPool pool;
  for (const int64_t megabytes : {3, 7, 5, 9, 2, 8, 4, 6})
    for (int i = 0; i < 3; ++i) {
      const auto a = block(megabytes, 1.0f), b = block(10 - megabytes, 2.0f);
      const auto now = memory_pool_statistics();
      CHECK(now.used == 10 << 20);
      CHECK(now.peak == 10 << 20);
      CHECK(now.used + now.free <= now.peak);
      CHECK(a[0].item<float>() + b[0].item<float>() == 3);
    }
}

TEST_CASE("tensors outlive the pool, small ones never meet it, and pools nest") {
  at::Tensor kept, small;
  {
    const MemoryPool outer;
    {
      const MemoryPool inner;
      kept = block(2, 5.0f);
      small = at::ones({8});
    }
    CHECK(memory_pool_statistics().used == 2 << 20);
    block(3, 1.0f);
    CHECK(memory_pool_statistics().free == 3 << 20);
  }
  CHECK(memory_pool_statistics().free == 0);
  CHECK(kept.eq(5.0f).all().item<bool>());
  CHECK(small.sum().item<float>() == 8);
  kept.reset();
  CHECK(memory_pool_statistics().used == 0);
  block(2, 1.0f);  // the heap's again
  CHECK(memory_pool_statistics().free == 0);
}

TEST_CASE("threads share the pool, and a child of fork goes on with it") {
  const MemoryPool pool;
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([t, &wrong] {
      for (int i = 0; i < 200; ++i) {
        const auto a = block(1 + (i + t) % 3, static_cast<float>(t));
        wrong[static_cast<size_t>(t)] += !a.eq(t).all().item<bool>();
      }
    });
  for (int i = 0; i < 5; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      void* data = at::empty({2 * kMega}).data_ptr();
      _exit(data != nullptr ? 0 : 1);
    }
    int status = 1;
    waitpid(child, &status, 0);
    CHECK(status == 0);
  }
  for (auto& thread : threads) thread.join();
  for (const int count : wrong) CHECK(count == 0);
}
