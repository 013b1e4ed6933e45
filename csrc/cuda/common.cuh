// What the CUDA kernels share. Kernel headers (*.cuh) are free of torch and use only the CUDA of the plain C++ kind,
// so that the tests can also run them on a CPU, one block after another (tests/emulator).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../math.h"

namespace ribfast::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// What a stored element is summed in.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using Acc = typename Accumulator<T>::type;

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrow(Acc<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// kVec elements that move as one access.
template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Pack {
  T at[kVec];
};

// Elements in one 16-byte access, or 1 where the maps (n elements each) would not keep it aligned.
template <typename T>
inline int vector_width(int64_t n, const void* a, const void* b = nullptr) {
  const auto misaligned = (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16;
  constexpr int kWide = 16 / sizeof(T);
  return n % kWide == 0 && misaligned == 0 ? kWide : 1;
}

// The last entry whose first_block is not beyond `block`.
template <typename Entry>
__device__ __forceinline__ int entry_of_block(const Entry* entries, int count, uint32_t block) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (entries[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// a / b to 2 ulp, 0 for float b above 2^126; the exact one calls a function, which costs registers.
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double quotient(double a, double b) { return a / b; }

// The first of `count` pixels whose tap is not before `cell`.
template <typename S>
__device__ __forceinline__ int32_t first_pixel(int32_t cell, S step, int32_t count, int32_t in) {
  if (cell == 0) return 0;
  if (cell >= in) return count;
  const S guess = quotient(static_cast<S>(cell) + S(0.5), step) - S(0.5);
  int32_t pixel = guess < static_cast<S>(count) ? static_cast<int32_t>(guess) : count;
  while (pixel < count && bilinear_tap<S>(pixel, step, in).cell < cell) ++pixel;
  while (pixel > 0 && bilinear_tap<S>(pixel - 1, step, in).cell >= cell) --pixel;
  return pixel;
}

struct Larger {  // NaN wins
  template <typename S>
  __device__ S operator()(S a, S b) const {
    return a > b || a != a ? a : b;
  }
};

struct Plus {
  template <typename S>
  __device__ S operator()(S a, S b) const {
    return a + b;
  }
};

// The combination of all threads' values, known to all threads. blockDim.x is a multiple of 32; `shared` holds 32 and
// may be used again after a __syncthreads().
template <typename S, typename Op>
__device__ S block_reduce(S value, Op op, S* shared) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = op(value, __shfl_xor_sync(kFullWarp, value, distance));
  }
  const int warps = blockDim.x / kWarp;
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = shared[0];
  for (int i = 1; i < warps; ++i) value = op(value, shared[i]);
  return value;
}

}  // namespace ribfast::cuda
