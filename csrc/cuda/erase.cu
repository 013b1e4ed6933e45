// erase on CUDA: kernels in erase.cuh, one launch each way. Maps of any strides; images and gradients of images are
// read as they are where they are contiguous or channels last, else copied. No maps launch nothing. Everything is added
// up in a fixed order; nothing waits for the device.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../backend.h"
#include "erase.cuh"
#include "launch.h"

namespace ribfast::cuda {
namespace {

MapStorage map_storage(const at::Tensor& maps) {
  switch (maps.scalar_type()) {
    case at::kDouble: return kDoubleMap;
    case at::kHalf: return kHalfMap;
    case at::kBFloat16: return kBFloat16Map;
    default: return kFloatMap;
  }
}

Pixels pixels_of(const at::Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

EraseMaps erase_maps(const at::Tensor& images, const at::Tensor& maps, const at::Tensor& which, double sharpness,
                     double level, bool interleaved) {
  const auto size = [](const at::Tensor& t, int64_t dim) { return static_cast<int32_t>(t.size(dim)); };
  const auto step = [&](int64_t dim) {
    const int32_t cells = size(maps, dim), pixels = size(images, dim + 1);
    if (maps.scalar_type() == at::kDouble) return static_cast<double>(cells) / static_cast<double>(pixels);
    return static_cast<double>(static_cast<float>(cells) / static_cast<float>(pixels));
  };
  return {maps.const_data_ptr(),
          maps.stride(0),
          maps.stride(1),
          maps.stride(2),
          which.const_data_ptr<int64_t>(),
          images.size(0),
          map_storage(maps),
          size(maps, 1),
          size(maps, 2),
          size(images, 1),
          size(images, 2),
          size(images, 3),
          interleaved && images.size(1) <= kLargestGroup ? size(images, 1) : 1,
          step(1),
          step(2),
          sharpness,
          level};
}

// Calls f(T{}, S{}) with the types of the images' elements and of the arithmetic.
template <typename F>
void with_types(const at::Tensor& images, const at::Tensor& maps, F&& f) {
  with_element(images, [&](auto element) {
    if (maps.scalar_type() == at::kDouble) {
      f(element, double{});
    } else {
      f(element, float{});
    }
  });
}

// How many blocks of each map have ended: none.
at::Tensor none_done(const at::Tensor& which, cudaStream_t stream) {
  at::Tensor done = at::empty(which.sizes(), which.options().dtype(at::kInt));
  C10_CUDA_CHECK(cudaMemsetAsync(done.data_ptr(), 0, done.nbytes(), stream));
  return done;
}

std::tuple<at::Tensor, at::Tensor> erase(const at::Tensor& images_, const at::Tensor& maps, const at::Tensor& which_,
                                         double sharpness, double level) {
  check_erase("erase", images_, maps, which_, sharpness, level);
  const c10::cuda::CUDAGuard guard(maps.device());
  const OnStream run{c10::cuda::getCurrentCUDAStream()};
  const at::Tensor images = dense_pixels(images_), which = which_.contiguous();
  const auto options = maps.options().dtype(accumulator_type(maps.scalar_type()));
  at::Tensor erased = empty_images(images, maps.size(0)), areas = at::empty(which.sizes(), options);
  const int64_t blocks = maps.size(0) * maps.size(1);
  if (blocks == 0) return {erased, areas};
  at::Tensor partial = at::empty({blocks}, options), done = none_done(which, run.stream);
  const EraseMaps given = erase_maps(images, maps, which, sharpness, level, is_interleaved(images));
  with_types(images, maps, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using S = decltype(accumulator);
    run(erase_kernel<T, S>, checked_grid("erase", blocks), kEraseThreads, given,
        static_cast<const T*>(images.const_data_ptr()), pixels_of(images), static_cast<T*>(erased.data_ptr()),
        pixels_of(erased), partial.data_ptr<S>(), done.data_ptr<int32_t>(), areas.data_ptr<S>());
  });
  return {erased, areas};
}

at::Tensor erase_backward(const std::optional<at::Tensor>& grad_, const std::optional<at::Tensor>& grad_areas_,
                          const at::Tensor& images_, const at::Tensor& maps, const at::Tensor& which_,
                          double sharpness, double level) {
  const char* op = "erase_backward";
  check_erase(op, images_, maps, which_, sharpness, level);
  check_erase_gradient(grad_, grad_areas_, images_, maps);
  const c10::cuda::CUDAGuard guard(maps.device());
  const OnStream run{c10::cuda::getCurrentCUDAStream()};
  const at::Tensor images = dense_pixels(images_), which = which_.contiguous();
  const auto options = maps.options().dtype(accumulator_type(maps.scalar_type()));
  at::Tensor grad, grad_areas;
  if (grad_) grad = dense_pixels(grad_->to(images.scalar_type()));
  if (grad_areas_) grad_areas = grad_areas_->to(options.dtype()).contiguous();
  at::Tensor result = at::empty(maps.sizes(), maps.options());
  const int64_t blocks = maps.size(0) * maps.size(1);
  if (blocks == 0) return result;
  at::Tensor partial = at::empty({blocks, 4, maps.size(2)}, options), done = none_done(which, run.stream);
  const bool interleaved = is_interleaved(images) && (!grad_ || is_interleaved(grad));
  const EraseMaps given = erase_maps(images, maps, which, sharpness, level, interleaved);
  with_types(images, maps, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using S = decltype(accumulator);
    run(erase_backward_kernel<T, S>, checked_grid(op, blocks), kEraseThreads, given,
        static_cast<const T*>(images.const_data_ptr()), pixels_of(images),
        grad_ ? static_cast<const T*>(grad.const_data_ptr()) : nullptr, grad_ ? pixels_of(grad) : Pixels{},
        grad_areas_ ? grad_areas.const_data_ptr<S>() : nullptr, partial.data_ptr<S>(), done.data_ptr<int32_t>(),
        result.data_ptr());
  });
  return result;
}

}  // namespace
}  // namespace ribfast::cuda

TORCH_LIBRARY_IMPL(ribfast, CUDA, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("erase", &ribfast::cuda::erase);
  m.impl("erase_backward", &ribfast::cuda::erase_backward);
}
