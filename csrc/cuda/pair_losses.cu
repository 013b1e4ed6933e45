// pair_losses on CUDA: kernels in pair_losses.cuh. Boundary and displacement of any float type and strides (copied).
// Sums of blocks are added up in double, in a fixed order.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../backend.h"
#include "launch.h"
#include "pair_losses.cuh"

namespace ribfast::cuda {
namespace {

// The maps as the kernels read them, and the blocks that they take.
struct PairInputs {
  at::Tensor boundary, displacement, labels;
  PairMaps maps;
  int64_t blocks;

  PairInputs(const at::Tensor& boundary_, const at::Tensor& displacement_, const at::Tensor& labels_, int64_t radius)
      : boundary(boundary_.to(at::kFloat).contiguous()),
        displacement(displacement_.to(at::kFloat).contiguous()),
        labels(labels_.contiguous()) {
    const int64_t height = boundary.size(1), width = boundary.size(2);
    const int64_t rows = height - (radius - 1), columns = width - 2 * (radius - 1);
    blocks = rows > 0 && columns > 0 ? boundary.size(0) * pair_tiles(rows, columns) : 0;
    maps = {boundary.const_data_ptr<float>(),
            displacement.const_data_ptr<float>(),
            labels.const_data_ptr<uint8_t>(),
            static_cast<int32_t>(height),
            static_cast<int32_t>(width),
            static_cast<int32_t>(rows),
            static_cast<int32_t>(columns),
            static_cast<int32_t>(pair_tiles(rows, 1)),
            static_cast<int32_t>(pair_tiles(1, columns)),
            static_cast<int>(radius)};
  }
};

at::Tensor pair_losses(const at::Tensor& boundary, const at::Tensor& displacement, const at::Tensor& labels,
                       int64_t radius) {
  check_pair_losses("pair_losses", boundary, displacement, labels, radius);
  const c10::cuda::CUDAGuard guard(boundary.device());
  const PairInputs given(boundary, displacement, labels, radius);
  if (given.blocks == 0) return at::zeros({kLossSums}, given.boundary.options());
  at::Tensor partial = at::empty({given.blocks, kLossSums}, given.boundary.options());
  pair_losses_kernel<<<checked_grid("pair_losses", given.blocks), kPairThreads, 0,
                       c10::cuda::getCurrentCUDAStream()>>>(given.maps, partial.data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return at::sum(partial, {0}, false, at::kDouble).to(at::kFloat);
}

std::tuple<at::Tensor, at::Tensor> pair_losses_backward(const at::Tensor& grad_, const at::Tensor& boundary,
                                                        const at::Tensor& displacement, const at::Tensor& labels,
                                                        int64_t radius) {
  check_pair_losses("pair_losses_backward", boundary, displacement, labels, radius);
  check_loss_gradient(grad_, boundary);
  at::globalContext().alertNotDeterministic("ribfast::pair_losses_backward");
  const c10::cuda::CUDAGuard guard(boundary.device());
  const PairInputs given(boundary, displacement, labels, radius);
  const at::Tensor grad = grad_.to(at::kFloat).contiguous();
  at::Tensor to_boundary = at::zeros(boundary.sizes(), given.boundary.options());
  at::Tensor to_displacement = at::zeros(displacement.sizes(), given.boundary.options());
  if (given.blocks > 0) {
    pair_losses_backward_kernel<<<checked_grid("pair_losses_backward", given.blocks), kPairThreads, 0,
                                  c10::cuda::getCurrentCUDAStream()>>>(
        given.maps, grad.const_data_ptr<float>(), to_boundary.data_ptr<float>(), to_displacement.data_ptr<float>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {to_boundary.to(boundary.scalar_type()), to_displacement.to(displacement.scalar_type())};
}

}  // namespace
}  // namespace ribfast::cuda

TORCH_LIBRARY_IMPL(ribfast, CUDA, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("pair_losses", &ribfast::cuda::pair_losses);
  m.impl("pair_losses_backward", &ribfast::cuda::pair_losses_backward);
}
