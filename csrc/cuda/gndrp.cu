// gndrp on CUDA: kernels in gndrp.cuh. Any strides (copied where not contiguous); N = 0 or C = 0 launches nothing.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../backend.h"
#include "gndrp.cuh"
#include "launch.h"

namespace ribfast::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor> gndrp(const at::Tensor& maps_, const at::Tensor& present_, double tau,
                                         bool divide_by_all, bool strict) {
  check_gndrp("gndrp", maps_, present_);
  const c10::cuda::CUDAGuard guard(maps_.device());
  const at::Tensor maps = maps_.contiguous(), present = present_.contiguous();
  const int64_t count = maps.size(0) * maps.size(1), n = maps.size(2) * maps.size(3);
  RIBFAST_CHECK_VALUE(n < (int64_t{1} << 31), "gndrp", "maps of fewer than 2^31 positions", n);
  const auto options = maps.options().dtype(accumulator_type(maps.scalar_type()));
  at::Tensor pooled = at::empty({maps.size(0), maps.size(1)}, options);
  at::Tensor stats = at::empty({maps.size(0), maps.size(1), 2}, options);
  if (count == 0) return {pooled, stats};
  with_element(maps, [&](auto element) {
    using T = decltype(element);
    const int width = vector_width<T>(n, maps.const_data_ptr());
    with_vector<T>(width, [&](auto vec) {
      gndrp_kernel<T, vec.value><<<checked_grid("gndrp", count), gndrp_threads(n, width), 0,
                                   c10::cuda::getCurrentCUDAStream()>>>(
          static_cast<const T*>(maps.const_data_ptr()), present.const_data_ptr<bool>(), n, tau, divide_by_all, strict,
          static_cast<Acc<T>*>(pooled.data_ptr()), static_cast<Acc<T>*>(stats.data_ptr()));
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {pooled, stats};
}

at::Tensor gndrp_backward(const at::Tensor& grad_, const at::Tensor& maps_, const at::Tensor& present_,
                          const at::Tensor& stats_, double tau, bool strict) {
  check_gndrp("gndrp_backward", maps_, present_);
  check_gndrp_backward(grad_, maps_, present_, stats_);
  const c10::cuda::CUDAGuard guard(maps_.device());
  const at::Tensor maps = maps_.contiguous(), present = present_.contiguous(), stats = stats_.contiguous(),
                   grad = grad_.to(stats_.scalar_type()).contiguous();
  const int64_t count = maps.size(0) * maps.size(1), n = maps.size(2) * maps.size(3);
  at::Tensor result = at::empty(maps.sizes(), maps.options());
  if (count == 0) return result;
  with_element(maps, [&](auto element) {
    using T = decltype(element);
    const int width = vector_width<T>(n, maps.const_data_ptr(), result.const_data_ptr());
    const int64_t blocks = gndrp_backward_blocks(n, width);
    with_vector<T>(width, [&](auto vec) {
      gndrp_backward_kernel<T, vec.value><<<checked_grid("gndrp_backward", count * blocks), kBackwardThreads, 0,
                                            c10::cuda::getCurrentCUDAStream()>>>(
          static_cast<const Acc<T>*>(grad.const_data_ptr()), static_cast<const T*>(maps.const_data_ptr()),
          present.const_data_ptr<bool>(), static_cast<const Acc<T>*>(stats.const_data_ptr()), n, blocks, tau, strict,
          static_cast<T*>(result.data_ptr()));
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

}  // namespace
}  // namespace ribfast::cuda

TORCH_LIBRARY_IMPL(ribfast, CUDA, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("gndrp", &ribfast::cuda::gndrp);
  m.impl("gndrp_backward", &ribfast::cuda::gndrp_backward);
}
