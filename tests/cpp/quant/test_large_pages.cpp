#include <ATen/ATen.h>
#include <doctest/doctest.h>

#include <budwood/quant/large_pages.h>
#include <cinttypes>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

using budwood::quant::empty_result;

namespace {

// Whether the system noted the wish for large pages where `at` lies ("hg" in its flags).
bool advised(const void* at) {
  std::ifstream maps("/proc/self/smaps");
  const auto address = reinterpret_cast<uintptr_t>(at);
  bool here = false;
  for (std::string line; std::getline(maps, line);) {
    uintptr_t begin = 0, end = 0;
    if (std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " ", &begin, &end) == 2)
      here = begin <= address && address < end;
    else if (here && line.starts_with("VmFlags:"))
      return line.find(" hg") != std::string::npos;
  }
  return false;
}

}  // namespace

TEST_CASE("empty_result has the sizes and the type that were asked for, and can be written whole") {
  for (const int64_t rows : {0, 1, 1000, 5001}) {
    auto t = empty_result({rows, 1024}, at::TensorOptions().dtype(at::kBFloat16));
    REQUIRE(t.sizes().vec() == std::vector<int64_t>{rows, 1024});
    CHECK((t.scalar_type() == at::kBFloat16));
    CHECK(t.is_contiguous());
    t.fill_(3);
    CHECK(t.sum(at::kDouble).item<double>() == 3.0 * static_cast<double>(t.numel()));
  }
}

#ifdef __linux__
TEST_CASE("a result of 4 MB or more asks for large pages, and only there") {
  if (!std::ifstream("/sys/kernel/mm/transparent_hugepage/enabled")) {
    MESSAGE("this system has no transparent large pages");
    return;
  }
  const auto floats = at::TensorOptions().dtype(at::kFloat);
  // Larger than what the heap keeps, so that it has pages of its own.
  const auto large = empty_result({40 << 18}, floats);
  CHECK(advised(large.const_data_ptr<float>() + (20 << 18)));
  const auto small = empty_result({1 << 18}, floats);
  CHECK_FALSE(advised(small.const_data_ptr<float>() + (1 << 17)));
}
#endif
