#include <budwood/quant/error.h>
#include <budwood/quant/kernels/bf16_choice.h>
#include <budwood/quant/kernels/isa.h>
#include <doctest/doctest.h>

using namespace budwood;
using namespace budwood::quant::kernels;

TEST_CASE("the arithmetic can be chosen, where the processor has it, and comes back") {
  const bool usual = multiplies_in_bf16();
  {
    const ScopedBf16 fp32(false);
    CHECK_FALSE(multiplies_in_bf16());
    if (has_avx512_bf16()) {
      const ScopedBf16 bf16(true);
      CHECK(multiplies_in_bf16());
      const ScopedIsa scalar(Isa::scalar);
      CHECK_FALSE(multiplies_in_bf16());
    }
    CHECK_FALSE(multiplies_in_bf16());
  }
  CHECK(multiplies_in_bf16() == usual);
  const ScopedIsa scalar(Isa::scalar);
  CHECK_THROWS_AS(ScopedBf16(true), Error);
  CHECK_FALSE(multiplies_in_bf16());
}
