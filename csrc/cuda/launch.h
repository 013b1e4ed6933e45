// What the CUDA operators share on torch's side.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../check.h"

namespace ribfast::cuda {

// Calls f(T{}) with the CUDA type of the elements of `t`.
template <typename F>
void with_element(const at::Tensor& t, F&& f) {
  switch (t.scalar_type()) {
    case at::kDouble: return f(double{});
    case at::kHalf: return f(__half{});
    case at::kBFloat16: return f(__nv_bfloat16{});
    default: return f(float{});
  }
}

// Calls f(std::integral_constant<int, kVec>) with 1 or a 16-byte access of T.
template <typename T, typename F>
void with_vector(int width, F&& f) {
  if (width == 1) {
    f(std::integral_constant<int, 1>{});
  } else {
    f(std::integral_constant<int, 16 / sizeof(T)>{});
  }
}

// Launches kernels one after another: what the sequences in *.cuh are run with.
struct OnStream {
  cudaStream_t stream;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, unsigned threads, const Arguments&... arguments) const {
    kernel<<<grid, threads, 0, stream>>>(arguments...);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

inline unsigned checked_grid(const char* op, int64_t blocks) {
  RIBFAST_CHECK_VALUE(blocks < (int64_t{1} << 31), op, "less work in one call (2^31 blocks)", blocks);
  return static_cast<unsigned>(blocks);
}

// Entries that travel in one launch's argument, `beside` other bytes: 4 KiB of it before CUDA 12.1, 32 KiB since.
template <typename Entry>
constexpr int entries_per_launch(int beside = 64) {
#if CUDART_VERSION >= 12010
  return (32764 - beside) / static_cast<int>(sizeof(Entry));
#else
  return (4096 - beside) / static_cast<int>(sizeof(Entry));
#endif
}

}  // namespace ribfast::cuda
