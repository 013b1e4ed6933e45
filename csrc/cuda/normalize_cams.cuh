// normalize: result = map / (max map + eps), in two kernels: maxima of parts, then the division.
//
// Layout: maps (count, n) contiguous, result likewise and possibly the same memory; parts (count, parts) accumulators.
// n >= 1, count >= 1. Grid of both: `parts` blocks for each map, map after map.
#pragma once

#include "common.cuh"

namespace ribfast::cuda {

constexpr int kNormalizeThreads = 256, kNormalizeAccesses = 8;

inline int64_t normalize_parts(int64_t n, int vec) {
  const int64_t part = static_cast<int64_t>(kNormalizeThreads) * kNormalizeAccesses * vec;
  return (n + part - 1) / part;
}

template <typename T, int kVec>
__global__ void part_maximum_kernel(const T* maps, int64_t n, int64_t parts, Acc<T>* maxima) {
  using S = Acc<T>;
  __shared__ S shared[kWarp];
  const int64_t index = blockIdx.x / parts, part = blockIdx.x % parts, accesses = n / kVec;
  const auto* map = reinterpret_cast<const Pack<T, kVec>*>(maps + index * n);
  const int64_t first = part * kNormalizeThreads * kNormalizeAccesses + threadIdx.x;
  S top = -static_cast<S>(INFINITY);
#pragma unroll
  for (int k = 0; k < kNormalizeAccesses; ++k) {
    const int64_t i = first + k * kNormalizeThreads;
    if (i < accesses) {
      const Pack<T, kVec> x = map[i];
#pragma unroll
      for (int v = 0; v < kVec; ++v) top = Larger()(top, widen(x.at[v]));
    }
  }
  top = block_reduce(top, Larger(), shared);
  if (threadIdx.x == 0) maxima[blockIdx.x] = top;
}

template <typename T, int kVec>
__global__ void normalize_kernel(const T* maps, int64_t n, int64_t parts, const Acc<T>* maxima, double eps,
                                 T* result) {
  using S = Acc<T>;
  __shared__ S shared[kWarp];
  const int64_t index = blockIdx.x / parts, part = blockIdx.x % parts, accesses = n / kVec;
  S top = -static_cast<S>(INFINITY);
  for (int64_t i = threadIdx.x; i < parts; i += blockDim.x) top = Larger()(top, maxima[index * parts + i]);
  const S divisor = block_reduce(top, Larger(), shared) + static_cast<S>(eps);
  const auto* map = reinterpret_cast<const Pack<T, kVec>*>(maps + index * n);
  auto* out = reinterpret_cast<Pack<T, kVec>*>(result + index * n);
  const int64_t first = part * kNormalizeThreads * kNormalizeAccesses + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kNormalizeAccesses; ++k) {
    const int64_t i = first + k * kNormalizeThreads;
    if (i < accesses) {
      Pack<T, kVec> x = map[i];
#pragma unroll
      for (int v = 0; v < kVec; ++v) x.at[v] = narrow<T>(widen(x.at[v]) / divisor);
      out[i] = x;
    }
  }
}

}  // namespace ribfast::cuda
