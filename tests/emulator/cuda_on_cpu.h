// Runs CUDA C++ kernels on a CPU, one block after another, each CUDA thread as a fibre: __syncthreads, warp shuffles
// and __shared__ memory behave as on the device, and threads can be scheduled in different orders to bring races to
// light. Slow and plain: it tests what a kernel computes where there is no GPU, not how fast.
#pragma once

#undef _FORTIFY_SOURCE  // which takes a jump to another stack for a mistake
#include <setjmp.h>
#include <ucontext.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one at a time
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulator {

struct Barrier {
  int waiting = 0, generation = 0;
};

struct Fibre {
  jmp_buf place;
  std::vector<char> stack;
  bool done = false;
};

inline jmp_buf scheduler;
inline std::vector<Fibre> fibres;
inline std::vector<Barrier> warp_barriers;
inline Barrier block_barrier;
inline std::vector<char> exchange;  // 8 bytes a thread
inline int current, alive;
inline bool progress;
inline const std::function<void()>* body;

// Jumps, because swapcontext asks the kernel for the signal mask every time.
inline void pause() {
  if (!_setjmp(fibres[current].place)) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier, int members) {
  const int generation = barrier.generation;
  if (++barrier.waiting == members) {
    barrier.waiting = 0, ++barrier.generation;
    progress = true;
  }
  while (barrier.generation == generation) pause();
}

// A fibre lives on: it is a thread of one block after another.
inline void run_fibre() {
  for (;;) {
    (*body)();
    fibres[current].done = true;
    --alive, progress = true;
    pause();
  }
}

inline void resume(Fibre& fibre) {
  if (_setjmp(scheduler)) return;
  if (!fibre.stack.empty()) _longjmp(fibre.place, 1);
  fibre.stack.resize(1 << 17);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fibre.stack.data();
  context.uc_stack.ss_size = fibre.stack.size();
  context.uc_link = nullptr;
  makecontext(&context, run_fibre, 0);
  setcontext(&context);
}

// order 0: threads take turns in ascending order, 1: descending, else shuffled by that seed.
inline void launch(dim3 grid, unsigned threads, unsigned order, const std::function<void()>& kernel) {
  std::vector<int> turns(threads);
  std::iota(turns.begin(), turns.end(), 0);
  if (order == 1) std::reverse(turns.begin(), turns.end());
  if (order > 1) std::shuffle(turns.begin(), turns.end(), std::mt19937(order));
  body = &kernel;
  blockDim = dim3(threads), gridDim = grid;
  fibres.resize(std::max<size_t>(fibres.size(), threads));
  exchange.assign(threads * 8, 0);
  for (unsigned block = 0; block < grid.x * grid.y; ++block) {
    blockIdx = {block % grid.x, block / grid.x, 0};
    warp_barriers.assign((threads + 31) / 32, {});
    block_barrier = {};
    alive = static_cast<int>(threads);
    for (unsigned i = 0; i < threads; ++i) fibres[i].done = false;
    while (alive > 0) {
      progress = false;
      for (const int i : turns) {
        if (fibres[i].done) continue;
        current = i, threadIdx = {static_cast<unsigned>(i), 0, 0};
        resume(fibres[i]);
      }
      if (!progress) {
        std::fprintf(stderr, "emulator: block %u is stuck: its threads wait at different barriers\n", block);
        std::abort();
      }
    }
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block_barrier, static_cast<int>(blockDim.x)); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  static_assert(sizeof(T) <= 8);
  if (mask != 0xffffffffu) std::abort();
  const int self = emulator::current, warp = self / 32;
  std::memcpy(&emulator::exchange[self * 8], &value, sizeof value);
  emulator::wait(emulator::warp_barriers[warp], 32);
  std::memcpy(&value, &emulator::exchange[(self ^ distance) * 8], sizeof value);
  emulator::wait(emulator::warp_barriers[warp], 32);
  return value;
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  static_assert(sizeof(T) <= 8);
  if (mask != 0xffffffffu) std::abort();
  const int self = emulator::current, warp = self / 32;
  std::memcpy(&emulator::exchange[self * 8], &value, sizeof value);
  emulator::wait(emulator::warp_barriers[warp], 32);
  if (self % 32 >= distance) std::memcpy(&value, &emulator::exchange[(self - distance) * 8], sizeof value);
  emulator::wait(emulator::warp_barriers[warp], 32);
  return value;
}

// Threads only change at barriers: these are atomic as they stand.
inline int atomicCAS(int* at, int expected, int value) {
  const int old = *at;
  if (old == expected) *at = value;
  return old;
}

inline int atomicMin(int* at, int value) {
  const int old = *at;
  *at = std::min(old, value);
  return old;
}

inline int atomicAdd(int* at, int value) {
  const int old = *at;
  *at += value;
  return old;
}

// On the device these are never contracted into a fused multiply-add; here nothing is.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __expf(float x) { return std::exp(x); }

inline float __fdividef(float a, float b) { return a / b; }

template <typename T>
T __ldg(const T* from) {
  return *from;
}

template <typename T>
T __ldcg(const T* from) {
  return *from;
}

inline void __threadfence() {}

inline float atomicAdd(float* at, float value) {
  const float old = *at;
  *at += value;
  return old;
}
