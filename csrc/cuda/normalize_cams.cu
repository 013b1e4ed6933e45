// normalize_cams on CUDA: kernels in normalize_cams.cuh. The in-place form writes through cams of any strides.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../backend.h"
#include "launch.h"
#include "normalize_cams.cuh"

namespace ribfast::cuda {
namespace {

void normalize_into(const at::Tensor& cams, double eps, const at::Tensor& result) {
  const int64_t n = cams.size(-1) * cams.size(-2), count = cams.numel() / n;
  if (count == 0) return;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  with_element(cams, [&](auto element) {
    using T = decltype(element);
    const int width = vector_width<T>(n, cams.const_data_ptr(), result.const_data_ptr());
    const int64_t parts = normalize_parts(n, width);
    const unsigned grid = checked_grid("normalize_cams", count * parts);
    at::Tensor maxima =
        at::empty({count, parts}, cams.options().dtype(accumulator_type(cams.scalar_type())));
    with_vector<T>(width, [&](auto vec) {
      part_maximum_kernel<T, vec.value><<<grid, kNormalizeThreads, 0, stream>>>(
          static_cast<const T*>(cams.const_data_ptr()), n, parts, static_cast<Acc<T>*>(maxima.data_ptr()));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      normalize_kernel<T, vec.value><<<grid, kNormalizeThreads, 0, stream>>>(
          static_cast<const T*>(cams.const_data_ptr()), n, parts, static_cast<const Acc<T>*>(maxima.const_data_ptr()),
          eps, static_cast<T*>(result.data_ptr()));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
}

at::Tensor normalize_cams(const at::Tensor& cams, double eps) {
  check_normalize_cams("normalize_cams", cams);
  const c10::cuda::CUDAGuard guard(cams.device());
  const at::Tensor result = at::empty(cams.sizes(), cams.options());
  normalize_into(cams.contiguous(), eps, result);
  return result;
}

void normalize_cams_(at::Tensor cams, double eps) {
  check_normalize_cams("normalize_cams", cams);
  const c10::cuda::CUDAGuard guard(cams.device());
  const at::Tensor dense = cams.contiguous();
  normalize_into(dense, eps, dense);
  if (!dense.is_same(cams)) cams.copy_(dense);
}

}  // namespace
}  // namespace ribfast::cuda

TORCH_LIBRARY_IMPL(ribfast, CUDA, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("normalize_cams", &ribfast::cuda::normalize_cams);
  m.impl("normalize_cams_", &ribfast::cuda::normalize_cams_);
}
