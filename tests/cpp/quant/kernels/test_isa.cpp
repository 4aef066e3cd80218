#include <budwood/quant/error.h>
#include <budwood/quant/kernels/isa.h>
#include <doctest/doctest.h>

#include <cstdlib>
#include <string>

using namespace budwood::quant::kernels;

TEST_CASE("a scoped instruction set is in use until its scope ends") {
  const Isa before = active_isa();
  {
    ScopedIsa scope(Isa::scalar);
    CHECK(active_isa() == Isa::scalar);
    CHECK_FALSE(has_avx512_bf16());
  }
  CHECK(active_isa() == before);
}

TEST_CASE("an instruction set that the processor lacks is refused by name") {
  if (best_isa() >= Isa::avx512) {
    ScopedIsa scope(Isa::avx512);
    CHECK(active_isa() == Isa::avx512);
  } else {
    CHECK_THROWS_AS(ScopedIsa{Isa::avx512}, budwood::Error);
    CHECK_THROWS_WITH_AS(isa_of_name("avx512"), doctest::Contains("lacks avx512; it has scalar"),
                         budwood::Error);
  }
  CHECK_THROWS_WITH_AS(isa_of_name("sse2"), doctest::Contains("'sse2' is no instruction set"),
                       budwood::Error);
}

TEST_CASE("tile registers come with everything of AVX-512, and go with it") {
  if (best_isa() < Isa::amx) {
    CHECK_THROWS_WITH_AS(isa_of_name("amx"), doctest::Contains("lacks amx; it has scalar"),
                         budwood::Error);
    return;
  }
  ScopedIsa amx(Isa::amx);
  CHECK(has_amx_bf16());
  CHECK(has_avx512_bf16());
  ScopedIsa avx512(Isa::avx512);
  CHECK_FALSE(has_amx_bf16());
  CHECK(has_avx512_bf16());
}

TEST_CASE("names are those that BUDWOOD_ISA takes") {
  CHECK(isa_of_name("scalar") == Isa::scalar);
  CHECK(std::string(isa_name(Isa::scalar)) == "scalar");
  CHECK(std::string(isa_name(Isa::avx2)) == "avx2");
  CHECK(std::string(isa_name(Isa::avx512)) == "avx512");
  CHECK(std::string(isa_name(Isa::amx)) == "amx");
  if (const char* asked = std::getenv("BUDWOOD_ISA")) {
    CHECK(std::string(isa_name(active_isa())) == asked);
  }
}
