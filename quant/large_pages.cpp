#include <ATen/ATen.h>

#include <budwood/quant/large_pages.h>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace budwood::quant {
namespace {

constexpr size_t kLeast = size_t{4} << 20;
constexpr uintptr_t kPage = uintptr_t{2} << 20;

// Only whole large pages within the tensor: nothing beside it grows.
void advise([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  // Advice: a system that refuses it gives small pages.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  auto result = at::empty(sizes, options);
  if (result.is_cpu() && result.nbytes() >= kLeast)
    advise(result.mutable_data_ptr(), result.nbytes());
  return result;
}

}  // namespace budwood::quant
