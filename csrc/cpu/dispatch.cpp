// The table of kernels for the CPU that this runs on. DPFAST_CPU_ISA=scalar|avx2 asks for less than it has.
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels.h"

namespace dpfast {

namespace scalar {
extern const Kernels table;
}
#ifdef DPFAST_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

static const Kernels& choose() {
#ifdef DPFAST_X86
  __builtin_cpu_init();
  const char* asked = std::getenv("DPFAST_CPU_ISA");
  const std::string most = asked ? asked : "avx512";
  if (most != "scalar") {
    const bool has512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (most != "avx2" && has512) return avx512::table;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      return avx2::table;
  }
#endif
  return scalar::table;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace dpfast
