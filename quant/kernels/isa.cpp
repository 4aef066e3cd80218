#include <budwood/quant/error.h>
#include <budwood/quant/kernels/isa.h>
#include <fmt/format.h>

#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <string>

namespace budwood::quant::kernels {
namespace {

constexpr int kUnset = -1;
std::atomic<int> current{kUnset};

// Tile registers are for processes that ask the system: threads save 8 KB more.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

Isa probe() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    return Isa::scalar;
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    const bool amx = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
                     __builtin_cpu_supports("amx-bf16");
    return amx && may_use_tiles() ? Isa::amx : Isa::avx512;
  }
  return Isa::avx2;
}

std::string available() {
  std::string names = isa_name(Isa::scalar);
  for (Isa isa : {Isa::avx2, Isa::avx512, Isa::amx}) {
    if (isa <= best_isa()) {
      names.append(", ").append(isa_name(isa));
    }
  }
  return names;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "scalar";
  }
}

Isa best_isa() {
  static const Isa best = probe();
  return best;
}

Isa isa_of_name(std::string_view name) {
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::amx}) {
    if (name == isa_name(isa)) {
      if (isa > best_isa()) {
        throw Error("isa_of_name",
                    fmt::format("this processor lacks {}; it has {}", name, available()));
      }
      return isa;
    }
  }
  throw Error(
      "isa_of_name",
      fmt::format("'{}' is no instruction set (BUDWOOD_ISA); wanted one of {}", name, available()));
}

Isa active_isa() {
  int isa = current.load(std::memory_order_relaxed);
  if (isa == kUnset) {
    const char* asked = std::getenv("BUDWOOD_ISA");
    isa = static_cast<int>(asked == nullptr || *asked == '\0' ? best_isa() : isa_of_name(asked));
    current.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

bool has_avx512_bf16() {
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  return supported && active_isa() >= Isa::avx512;
}

bool has_amx_bf16() {
  return active_isa() == Isa::amx;
}

ScopedIsa::ScopedIsa(Isa isa) : previous_(current.load()) {
  if (isa > best_isa()) {
    throw Error("ScopedIsa",
                fmt::format("{} asked for; this processor has {}", isa_name(isa), available()));
  }
  current.store(static_cast<int>(isa));
}

ScopedIsa::~ScopedIsa() {
  current.store(previous_);
}

}  // namespace budwood::quant::kernels
