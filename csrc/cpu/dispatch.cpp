// Which tier runs: asked once, of torch, so that ATEN_CPU_CAPABILITY steers it.
#include <ATen/Version.h>

#include <string>

#include "kernels.h"

namespace ribfast::cpu {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(RIBFAST_X86_TIERS)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return tier_avx512;
    if (capability == "AVX2") return tier_avx2;
#endif
    return tier_default;
  }();
  return chosen;
}

const char* compiled_tiers() {
#if defined(RIBFAST_X86_TIERS)
  return "default avx2 avx512";
#else
  return "default";
#endif
}

}  // namespace ribfast::cpu
