// GNDRP(T) = sum over U_tau of T(u) / divisor, U_tau = {u : T(u) / max T <= tau}, and its gradient.
//
// Layout: maps (count, n) contiguous, one block a map; present (count) bool; pooled (count) and stats (count, 2) =
// {maximum, divisor} in accumulators. n >= 1, count >= 1. Sums run in a fixed order.
#pragma once

#include "common.cuh"

namespace ribfast::cuda {

// Vector accesses that a thread keeps in registers; what lies beyond is read from memory a second time.
constexpr int held_accesses(int vec) { return vec == 1 ? 16 : 4; }

inline int gndrp_threads(int64_t n, int vec) {
  int threads = 64;
  while (threads < 512 && static_cast<int64_t>(threads) * held_accesses(vec) * vec < n) threads *= 2;
  return threads;
}

template <typename T, int kVec>
__global__ void gndrp_kernel(const T* maps, const bool* present, int64_t n, double tau_, bool divide_by_all,
                             bool strict, Acc<T>* pooled, Acc<T>* stats) {
  using S = Acc<T>;
  constexpr int kHeld = held_accesses(kVec);
  __shared__ S shared_value[kWarp], shared_sum[kWarp];
  __shared__ int shared_count[kWarp];
  const int64_t index = blockIdx.x, accesses = n / kVec;
  const auto* map = reinterpret_cast<const Pack<T, kVec>*>(maps + index * n);
  const bool is_present = present[index];
  const S tau = static_cast<S>(tau_);

  Pack<T, kVec> held[kHeld];
  S top = -static_cast<S>(INFINITY);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int64_t i = threadIdx.x + static_cast<int64_t>(k) * blockDim.x;
    if (i < accesses) held[k] = map[i];
  }
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int64_t i = threadIdx.x + static_cast<int64_t>(k) * blockDim.x;
    if (i < accesses) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) top = Larger()(top, widen(held[k].at[v]));
    }
  }
  const int64_t beyond = threadIdx.x + static_cast<int64_t>(kHeld) * blockDim.x;
  for (int64_t i = beyond; i < accesses; i += blockDim.x) {
    const Pack<T, kVec> x = map[i];
#pragma unroll
    for (int v = 0; v < kVec; ++v) top = Larger()(top, widen(x.at[v]));
  }
  top = block_reduce(top, Larger(), shared_value) + S(0);  // + 0: a maximum of -0 counts as 0

  const bool all = !is_present || top != top;
  S sum = 0;
  int count = 0;
  const auto add = [&](T element) {
    const S x = widen(element);
    if (all || is_kept(x, top, tau, strict)) sum += x, ++count;
  };
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int64_t i = threadIdx.x + static_cast<int64_t>(k) * blockDim.x;
    if (i < accesses) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) add(held[k].at[v]);
    }
  }
  S total = sum, error = 0;  // compensated (Kahan): a thread may add up thousands of elements here
  for (int64_t i = beyond; i < accesses; i += blockDim.x) {
    const Pack<T, kVec> x = map[i];
    sum = 0;
#pragma unroll
    for (int v = 0; v < kVec; ++v) add(x.at[v]);
    const S corrected = sum - error, next = total + corrected;
    error = (next - total) - corrected;
    total = next;
  }
  sum = block_reduce(total, Plus(), shared_sum);
  count = block_reduce(count, Plus(), shared_count);
  if (threadIdx.x == 0) {
    const S divisor = divide_by_all || !is_present ? static_cast<S>(n) : static_cast<S>(count > 0 ? count : 1);
    pooled[index] = sum / divisor;
    stats[2 * index] = is_present ? top : S(0);
    stats[2 * index + 1] = divisor;
  }
}

// Accesses that one block of the backward handles.
constexpr int kBackwardThreads = 128, kBackwardAccesses = 4;

inline int64_t gndrp_backward_blocks(int64_t n, int vec) {
  const int64_t block = static_cast<int64_t>(kBackwardThreads) * kBackwardAccesses * vec;
  return (n + block - 1) / block;  // for each map
}

// dT(u) = g [u in U_tau] / divisor. Grid: blocks_per_map blocks for each map, map after map.
template <typename T, int kVec>
__global__ void gndrp_backward_kernel(const Acc<T>* grad, const T* maps, const bool* present, const Acc<T>* stats,
                                      int64_t n, int64_t blocks_per_map, double tau_, bool strict, T* result) {
  using S = Acc<T>;
  const int64_t index = blockIdx.x / blocks_per_map, part = blockIdx.x % blocks_per_map, accesses = n / kVec;
  const auto* map = reinterpret_cast<const Pack<T, kVec>*>(maps + index * n);
  auto* out = reinterpret_cast<Pack<T, kVec>*>(result + index * n);
  const S top = stats[2 * index], tau = static_cast<S>(tau_);
  const bool all = !present[index] || top != top;
  const T value = narrow<T>(grad[index] / stats[2 * index + 1]), zero = narrow<T>(S(0));
  const int64_t first = part * kBackwardThreads * kBackwardAccesses + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kBackwardAccesses; ++k) {
    const int64_t i = first + k * kBackwardThreads;
    if (i < accesses) {
      Pack<T, kVec> x = map[i];
#pragma unroll
      for (int v = 0; v < kVec; ++v) x.at[v] = all || is_kept(widen(x.at[v]), top, tau, strict) ? value : zero;
      out[i] = x;
    }
  }
}

}  // namespace ribfast::cuda
