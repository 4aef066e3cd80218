#pragma once

#include <string_view>

/// Which instruction set the kernels use, chosen once at run time.
///
/// Each kernel has a scalar source and one per instruction set; all give the same bits, so that a
/// result does not depend on the machine.
namespace budwood::quant::kernels {

enum class Isa {
  scalar = 0,  ///< plain C++
  avx2 = 1,    ///< AVX2, FMA and F16C
  avx512 = 2,  ///< AVX-512 F, BW, VL and DQ
  amx = 3,     ///< AVX-512 and its BF16, with AMX's tile registers for products in bf16
};

/// "scalar", "avx2", "avx512" or "amx".
const char* isa_name(Isa isa);

/// The widest set this processor has.
Isa best_isa();

/// The set of that name. Throws Error for another name and for a set that this processor lacks,
/// with the names of those it has.
Isa isa_of_name(std::string_view name);

/// The set in use: best_isa(), or what the environment variable BUDWOOD_ISA=scalar|avx2|avx512|amx
/// asks for; throws as isa_of_name.
Isa active_isa();

/// True when the processor multiplies bfloat16 (AVX512_BF16) and active_isa() is avx512 or amx.
bool has_avx512_bf16();

/// True when active_isa() is amx.
bool has_amx_bf16();

/// Forces an instruction set while it lives, for the whole process, so that one test runs all
/// paths. Throws Error when the processor lacks the set. Not for use while kernels run in other
/// threads.
class ScopedIsa {
 public:
  explicit ScopedIsa(Isa isa);
  ~ScopedIsa();
  ScopedIsa(const ScopedIsa&) = delete;
  ScopedIsa& operator=(const ScopedIsa&) = delete;

 private:
  int previous_;
};

/// Of three versions of a kernel the one in use; avx512 serves amx too.
template <class Path>
const Path& active_path(const Path& scalar, const Path& avx2, const Path& avx512) {
  switch (active_isa()) {
    case Isa::amx:
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return scalar;
  }
}

}  // namespace budwood::quant::kernels
