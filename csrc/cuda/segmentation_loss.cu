// pixel_losses and their sums on CUDA: kernels in segmentation_loss.cuh. Logits of any strides (copied where they are
// not contiguous, or float64); an empty batch launches nothing. Labels that there are not are ignored: nothing waits for
// the device. Everything is added up in a fixed order.
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../backend.h"
#include "launch.h"
#include "segmentation_loss.cuh"

namespace ribfast::cuda {
namespace {

// Logits and labels as the kernels read them.
struct LossInputs {
  at::Tensor logits, labels;
  LossMaps maps;

  LossInputs(const at::Tensor& logits_, const at::Tensor& labels_)
      : logits((logits_.scalar_type() == at::kDouble ? logits_.to(at::kFloat) : logits_).contiguous()),
        labels(labels_.contiguous()),
        maps{labels.const_data_ptr<uint8_t>(),
             static_cast<int32_t>(logits.size(1)),
             static_cast<int32_t>(logits.size(2)),
             static_cast<int32_t>(logits.size(3)),
             static_cast<int32_t>(labels.size(1)),
             static_cast<int32_t>(labels.size(2))} {}

  int64_t cells() const { return logits.size(0) * logits.size(2) * logits.size(3); }
};

// Calls f(T{}) with the CUDA type of logits, which are not float64.
template <typename F>
void with_logits(const LossInputs& given, F&& f) {
  with_element(given.logits, [&](auto element) {
    if constexpr (!std::is_same_v<decltype(element), double>) f(element);
  });
}

LossFit fit_of(const std::optional<at::Tensor>& active, int64_t fit, double k) {
  return {fit == kFitAll ? nullptr : active->const_data_ptr<bool>(), static_cast<int32_t>(fit), static_cast<float>(k)};
}

at::Tensor pixel_losses(const at::Tensor& logits, const at::Tensor& labels) {
  check_pixel_losses("segmentation_loss", logits, labels);
  const c10::cuda::CUDAGuard guard(logits.device());
  const OnStream run{c10::cuda::getCurrentCUDAStream()};
  const LossInputs given(logits, labels);
  at::Tensor result = at::empty(labels.sizes(), logits.options().dtype(at::kFloat));
  if (given.cells() == 0) return result;
  with_logits(given, [&](auto element) {
    using T = decltype(element);
    run(pixel_losses_kernel<T>, checked_grid("pixel_losses", given.cells()), kLossThreads,
        static_cast<const T*>(given.logits.const_data_ptr()), given.maps, result.data_ptr<float>());
  });
  return result;
}

at::Tensor pixel_loss_sums(const at::Tensor& logits, const at::Tensor& labels_, const at::Tensor& losses_,
                           const std::optional<at::Tensor>& active, int64_t fit, double k) {
  check_pixel_loss_sums("pixel_loss_sums", logits, labels_, losses_, active, fit, k);
  const c10::cuda::CUDAGuard guard(logits.device());
  const OnStream run{c10::cuda::getCurrentCUDAStream()};
  const at::Tensor labels = labels_.contiguous(), losses = losses_.contiguous();
  const int64_t n = losses.numel(), blocks = (n + kLossSumPixels - 1) / kLossSumPixels;
  const auto options = losses.options().dtype(at::kDouble);
  if (n == 0) return at::zeros({4}, options);
  LossMaps maps{};
  maps.labels = labels.const_data_ptr<uint8_t>(), maps.n_labels = static_cast<int32_t>(logits.size(1));
  at::Tensor partial = at::empty({blocks, 4}, options);
  run(pixel_loss_sums_kernel, checked_grid("pixel_loss_sums", blocks), kLossSumThreads, losses.const_data_ptr<float>(),
      maps, n, fit_of(active, fit, k), partial.data_ptr<double>());
  return at::sum(partial, {0});
}

at::Tensor pixel_loss_sums_backward(const at::Tensor& grad_, const at::Tensor& logits, const at::Tensor& labels,
                                    const at::Tensor& losses_, const std::optional<at::Tensor>& active, int64_t fit,
                                    double k) {
  const char* op = "pixel_loss_sums_backward";
  check_pixel_loss_sums(op, logits, labels, losses_, active, fit, k);
  check_pixel_loss_gradient(grad_, logits);
  const c10::cuda::CUDAGuard guard(logits.device());
  const OnStream run{c10::cuda::getCurrentCUDAStream()};
  const LossInputs given(logits, labels);
  const at::Tensor grad = grad_.contiguous(), losses = losses_.contiguous();
  at::Tensor result = at::empty(logits.sizes(), given.logits.options());
  const int64_t n = result.numel();
  if (n > 0) {
    at::Tensor partial = at::empty({given.cells(), 4, logits.size(1)}, losses.options());
    with_logits(given, [&](auto element) {
      using T = decltype(element);
      run(pixel_losses_backward_kernel<T>, checked_grid(op, given.cells()), kLossThreads, grad.const_data_ptr<double>(),
          static_cast<const T*>(given.logits.const_data_ptr()), losses.const_data_ptr<float>(), given.maps,
          fit_of(active, fit, k), partial.data_ptr<float>());
      run(gather_corners_kernel<T>, checked_grid(op, (n + kGatherThreads - 1) / kGatherThreads), kGatherThreads,
          partial.const_data_ptr<float>(), given.maps, n, static_cast<T*>(result.data_ptr()));
    });
  }
  return result.to(logits.scalar_type());
}

}  // namespace
}  // namespace ribfast::cuda

TORCH_LIBRARY_IMPL(ribfast, CUDA, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("pixel_losses", &ribfast::cuda::pixel_losses);
  m.impl("pixel_loss_sums", &ribfast::cuda::pixel_loss_sums);
  m.impl("pixel_loss_sums_backward", &ribfast::cuda::pixel_loss_sums_backward);
}
