// Lists the known instruction sets, detects those this processor supports, and selects the best.
#include <string.h>

#include "isa.h"

#if defined(ACQCORE_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace acqcore {

#define ACQCORE_DECLARE(isa) \
  namespace isa {            \
  extern const Operations kOperations; \
  }

#if defined(ACQCORE_X86)
ACQCORE_DECLARE(v2)
ACQCORE_DECLARE(v3)
ACQCORE_DECLARE(v4)
ACQCORE_DECLARE(v4_bf16)
ACQCORE_DECLARE(v4_amx)
#else
ACQCORE_DECLARE(native)
#endif

namespace {

#if defined(ACQCORE_X86)
bool has_v2() { return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt"); }
bool has_v3() {
  return has_v2() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_v4_bf16() { return has_v4() && __builtin_cpu_supports("avx512bf16"); }

// Linux grants tile registers on request, to all current and future threads of the process.
bool lent_tiles() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // in edx of leaf 7
  constexpr long kAsk = 0x1023, kTileData = 18;            // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBf16) && (edx & kTiles) &&
         syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
#else
  return false;
#endif
}

bool has_v4_amx() {
  static const bool lent = has_v4_bf16() && lent_tiles();
  return lent;
}

const Isa kIsas[] = {
    {"x86-64-v2", has_v2, &v2::kOperations},
    {"x86-64-v3", has_v3, &v3::kOperations},
    {"x86-64-v4", has_v4, &v4::kOperations},
    {"x86-64-v4-bf16", has_v4_bf16, &v4_bf16::kOperations},
    {"x86-64-v4-amx", has_v4_amx, &v4_amx::kOperations},
};
#elif defined(__aarch64__)
const Isa kIsas[] = {{"neon", [] { return true; }, &native::kOperations}};
#else
const Isa kIsas[] = {{"generic", [] { return true; }, &native::kOperations}};
#endif

}  // namespace

const Isa* isas(int* count) {
  *count = sizeof kIsas / sizeof kIsas[0];
  return kIsas;
}

const Isa* find_isa(const char* name) {
  for (const Isa& isa : kIsas)
    if (strcmp(isa.name, name) == 0) return &isa;
  return nullptr;
}

const Isa* best_isa() {
  const Isa* best = nullptr;
  for (const Isa& isa : kIsas)
    if (isa.supported()) best = &isa;
  return best;
}

}  // namespace acqcore
