// The baseline tier: what the compiler emits for any processor of the architecture.
#include "kernels.h"
#include "../math.h"

#define RIBFAST_TIER_NAME "default"
#define RIBFAST_TIER_TABLE tier_default
#define RIBFAST_VECTOR_BYTES 16
#include "kernels.inl"
