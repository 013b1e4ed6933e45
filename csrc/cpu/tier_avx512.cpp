// The AVX-512 (F, VL, BW, DQ) tier.
#include "kernels.h"

#if defined(RIBFAST_X86_TIERS)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12: both false in its own avx512fintrin.h
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#include "../math.h"

#define RIBFAST_TIER_NAME "avx512"
#define RIBFAST_TIER_TABLE tier_avx512
#define RIBFAST_VECTOR_BYTES 64
#include "kernels.inl"
#pragma GCC pop_options
#endif
