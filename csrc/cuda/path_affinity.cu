// path_affinity on CUDA: kernels in path_affinity.cuh. Any float type and strides (copied); an empty batch launches
// nothing.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../backend.h"
#include "launch.h"
#include "path_affinity.cuh"

namespace ribfast::cuda {
namespace {

at::Tensor path_affinity(const at::Tensor& boundary_, int64_t radius, double beta) {
  check_path_affinity("path_affinity", boundary_, radius, beta);
  const c10::cuda::CUDAGuard guard(boundary_.device());
  const at::Tensor boundary = boundary_.to(at::kFloat).contiguous();
  const auto count = boundary.size(0), height = boundary.size(1), width = boundary.size(2);
  at::Tensor result = at::empty({count, count_pairs(static_cast<int32_t>(radius)), height, width}, boundary.options());
  if (count == 0) return result;
  path_affinity_kernel<<<checked_grid("path_affinity", count * pair_tiles(height, width)), kPairThreads, 0,
                         c10::cuda::getCurrentCUDAStream()>>>(
      boundary.const_data_ptr<float>(), static_cast<int32_t>(height), static_cast<int32_t>(width),
      static_cast<int32_t>(pair_tiles(height, 1)), static_cast<int32_t>(pair_tiles(1, width)),
      static_cast<int>(radius), static_cast<float>(beta), result.data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

at::Tensor path_affinity_backward(const at::Tensor& grad_, const at::Tensor& boundary_, int64_t radius, double beta) {
  check_path_affinity("path_affinity_backward", boundary_, radius, beta);
  check_pair_gradient(grad_, boundary_, radius);
  at::globalContext().alertNotDeterministic("ribfast::path_affinity_backward");
  const c10::cuda::CUDAGuard guard(boundary_.device());
  const at::Tensor boundary = boundary_.to(at::kFloat).contiguous(), grad = grad_.to(at::kFloat).contiguous();
  const auto count = boundary.size(0), height = boundary.size(1), width = boundary.size(2);
  at::Tensor result = at::zeros(boundary.sizes(), boundary.options());
  if (count == 0) return result.to(boundary_.scalar_type());
  path_affinity_backward_kernel<<<checked_grid("path_affinity_backward", count * pair_tiles(height, width)),
                                  kPairThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      grad.const_data_ptr<float>(), boundary.const_data_ptr<float>(), static_cast<int32_t>(height),
      static_cast<int32_t>(width), static_cast<int32_t>(pair_tiles(height, 1)),
      static_cast<int32_t>(pair_tiles(1, width)), static_cast<int>(radius), static_cast<float>(beta),
      result.data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result.to(boundary_.scalar_type());
}

}  // namespace
}  // namespace ribfast::cuda

TORCH_LIBRARY_IMPL(ribfast, CUDA, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("path_affinity", &ribfast::cuda::path_affinity);
  m.impl("path_affinity_backward", &ribfast::cuda::path_affinity_backward);
}
