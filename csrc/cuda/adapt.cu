// activate_, activate_backward and update_folded_ on CUDA: kernels in adapt.cuh. No cells or no channels, no rows of
// weights: nothing is launched, but for the sums of no cells, which are 0. Nothing here waits for the device.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../backend.h"
#include "adapt.cuh"
#include "launch.h"

namespace ribfast::cuda {
namespace {

template <typename T>
const T* pointer(const std::optional<at::Tensor>& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

void activate_(at::Tensor y, const std::optional<at::Tensor>& shortcut, const std::optional<at::Tensor>& mask,
               double limit) {
  check_activate_(y, shortcut, mask, limit);
  const c10::cuda::CUDAGuard guard(y.device());
  const OnStream run{c10::cuda::getCurrentCUDAStream()};
  const int64_t channels = y.size(1), cells = channels ? y.numel() / channels : 0;
  if (cells == 0) return;
  with_element(y, [&](auto element) {
    using T = decltype(element);
    with_vector<T>(vector_width<T>(channels, y.const_data_ptr(), pointer<T>(shortcut)), [&](auto vec) {
      run(activate_kernel<T, vec.value>, checked_grid("activate_", activate_blocks(cells, channels, vec.value)),
          kCellThreads, static_cast<T*>(y.data_ptr()), pointer<T>(shortcut), pointer<T>(mask), cells,
          channels / vec.value, limit);
    });
  });
}

std::tuple<at::Tensor, at::Tensor> activate_backward(const at::Tensor& grad, const at::Tensor& y, double limit) {
  check_activate_backward(grad, y, limit);
  const c10::cuda::CUDAGuard guard(y.device());
  const OnStream run{c10::cuda::getCurrentCUDAStream()};
  const int64_t channels = y.size(1), cells = channels ? y.numel() / channels : 0;
  const auto options = y.options().dtype(accumulator_type(y.scalar_type()));
  const at::Tensor result = at::empty_like(y), sums = at::empty({channels}, options);
  if (channels == 0) return {result, sums};
  with_element(y, [&](auto element) {
    using T = decltype(element);
    using S = Acc<T>;
    const int width = std::min(vector_width<T>(channels, y.const_data_ptr(), grad.const_data_ptr()),
                               vector_width<T>(channels, result.const_data_ptr()));
    with_vector<T>(width, [&](auto vec) {
      const Strips strips = share_strips(cells, channels, vec.value);
      const at::Tensor partial = strips.count == 1 ? sums : at::empty({strips.count, channels}, options);
      if (cells > 0) {
        run(activate_backward_kernel<T, vec.value>, checked_grid("activate_backward", strips.count * strips.tiles),
            kCellThreads, static_cast<const T*>(grad.const_data_ptr()), static_cast<const T*>(y.const_data_ptr()),
            cells, channels, strips, limit, static_cast<T*>(result.data_ptr()), static_cast<S*>(partial.data_ptr()));
      }
      if (strips.count == 1) return;
      run(sum_strips_kernel<S>, checked_grid("activate_backward", (channels + kWarp - 1) / kWarp), kSumThreads,
          static_cast<const S*>(partial.const_data_ptr()), strips.count, channels, static_cast<S*>(sums.data_ptr()));
    });
  });
  return {result, sums};
}

void update_folded_(const at::Tensor& grad, const at::Tensor& bias_grad, const std::optional<at::Tensor>& anchor,
                    const std::optional<at::Tensor>& bias_anchor, const at::Tensor& weight, const at::Tensor& affine,
                    const at::Tensor& norm, at::Tensor new_weight, at::Tensor new_affine, at::Tensor velocity,
                    at::Tensor affine_velocity, at::Tensor folded, at::Tensor folded_bias, bool first,
                    const at::Tensor& rate, double momentum, double decay, double scale) {
  check_update_folded_(grad, bias_grad, anchor, bias_anchor, weight, affine, norm, new_weight, new_affine, velocity,
                       affine_velocity, folded, folded_bias, rate);
  const c10::cuda::CUDAGuard guard(weight.device());
  const OnStream run{c10::cuda::getCurrentCUDAStream()};
  const int64_t rows = weight.size(0), n = rows ? weight.numel() / rows : 0;
  if (rows == 0) return;
  with_element(grad, [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, double>) {  // which the check refuses
      const FoldedUpdate<T> update{static_cast<const T*>(grad.const_data_ptr()),
                                   static_cast<const T*>(bias_grad.const_data_ptr()),
                                   pointer<T>(anchor),
                                   pointer<T>(bias_anchor),
                                   weight.const_data_ptr<float>(),
                                   affine.const_data_ptr<float>(),
                                   norm.const_data_ptr<float>(),
                                   rate.const_data_ptr<float>(),
                                   new_weight.data_ptr<float>(),
                                   new_affine.data_ptr<float>(),
                                   velocity.data_ptr<float>(),
                                   affine_velocity.data_ptr<float>(),
                                   static_cast<T*>(folded.data_ptr()),
                                   static_cast<T*>(folded_bias.data_ptr()),
                                   rows,
                                   n,
                                   static_cast<float>(momentum),
                                   static_cast<float>(decay),
                                   static_cast<float>(1 / scale),
                                   first};
      const int width = update_width<T>(
          n, address(update.grad) | address(update.anchor) | address(update.folded),
          address(update.weight) | address(update.new_weight) | address(update.velocity));
      const unsigned grid = checked_grid("update_folded_", rows), threads = update_threads(n);
      if (width == 1) {
        run(update_folded_kernel<T, 1>, grid, threads, update);
      } else {
        run(update_folded_kernel<T, 4>, grid, threads, update);
      }
    }
  });
}

}  // namespace
}  // namespace ribfast::cuda

TORCH_LIBRARY_IMPL(ribfast, CUDA, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("activate_", &ribfast::cuda::activate_);
  m.impl("activate_backward", &ribfast::cuda::activate_backward);
  m.impl("update_folded_", &ribfast::cuda::update_folded_);
}
