// The AVX2 + FMA + F16C tier.
#include "kernels.h"

#if defined(RIBFAST_X86_TIERS)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "../math.h"

#define RIBFAST_TIER_NAME "avx2"
#define RIBFAST_TIER_TABLE tier_avx2
#define RIBFAST_VECTOR_BYTES 32
#include "kernels.inl"
#pragma GCC pop_options
#endif
