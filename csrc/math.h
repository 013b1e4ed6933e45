// Scalar arithmetic that host and device kernels share. Free of torch.
// Include it by a relative path: with csrc/ on the include path it would hide the C library's <math.h>.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RIBFAST_HD __host__ __device__ __forceinline__
#else
#define RIBFAST_HD inline
#endif

namespace ribfast {
namespace {  // internal linkage: each CPU tier must keep its own copy

// Where output position `dst` of a bilinear (align_corners=False) resize reads: input cells `cell` and `cell + 1`
// (clamped to in - 1) with weights 1 - t and t.
template <typename S>
struct Tap {
  int32_t cell;
  S t;
};

template <typename S>
RIBFAST_HD Tap<S> bilinear_tap(int32_t dst, S step, int32_t in) {
  S position = step * (static_cast<S>(dst) + S(0.5)) - S(0.5);
  position = position < 0 ? S(0) : position;
  int32_t cell = static_cast<int32_t>(position);
  cell = cell < in - 1 ? cell : in - 1;
  const S t = position - static_cast<S>(cell);
  return {cell, t < 1 ? t : S(1)};
}

// U_tau of one map with maximum `top`: is x / top on the kept side of tau?
template <typename S>
RIBFAST_HD bool is_kept(S x, S top, S tau, bool strict) {
  const S level = x / top;
  return strict ? level < tau : level <= tau;
}

}  // namespace
}  // namespace ribfast
