// activate_, activate_backward and update_folded_ on the CPU: threads over cells, over rows of weights.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../backend.h"
#include "../check.h"
#include "storage.h"

namespace ribfast::cpu {
namespace {

void activate_(at::Tensor y, const std::optional<at::Tensor>& shortcut, const std::optional<at::Tensor>& mask,
               double limit) {
  check_activation("activate_", y, limit);
  const int64_t channels = y.size(1), cells = channels ? y.numel() / channels : 0;
  if (shortcut) check_like("activate_", "shortcut", *shortcut, y);
  if (mask) {
    RIBFAST_CHECK_VALUE(mask->dim() == 4 && mask->numel() * channels == y.numel() && mask->size(2) == y.size(2) &&
                            mask->is_contiguous(),
                        "activate_", "a contiguous mask (N, 1, H, W) of y", mask->sizes(), " for ", y.sizes());
    check_same_type("activate_", "mask", *mask, y);
  }
  const auto kernel = kernels().activate[storage_of(y)];
  at::parallel_for(0, cells, grain(channels), [&](int64_t begin, int64_t end) {
    kernel(offset(y, begin * channels), shortcut ? offset(*shortcut, begin * channels) : nullptr,
           mask ? offset(*mask, begin) : nullptr, end - begin, channels, limit);
  });
}

std::tuple<at::Tensor, at::Tensor> activate_backward(const at::Tensor& grad, const at::Tensor& y, double limit) {
  check_activation("activate_backward", y, limit);
  check_like("activate_backward", "grad", grad, y);
  const int64_t channels = y.size(1), cells = channels ? y.numel() / channels : 0;
  const at::Tensor result = at::empty_like(y);
  const at::Tensor sums =
      at::zeros({at::get_num_threads(), channels}, y.options().dtype(accumulator_type(y.scalar_type())));
  const auto kernel = kernels().activate_backward[storage_of(y)];
  at::parallel_for(0, cells, grain(channels), [&](int64_t begin, int64_t end) {
    kernel(offset(grad, begin * channels), offset(y, begin * channels), end - begin, channels, limit,
           offset(result, begin * channels), offset(sums, at::get_thread_num() * channels));
  });
  return {result, sums.sum(0)};
}

void update_folded_(const at::Tensor& grad, const at::Tensor& bias_grad, const std::optional<at::Tensor>& anchor,
                    const std::optional<at::Tensor>& bias_anchor, const at::Tensor& weight, const at::Tensor& affine,
                    const at::Tensor& norm, at::Tensor new_weight, at::Tensor new_affine, at::Tensor velocity,
                    at::Tensor affine_velocity, at::Tensor folded, at::Tensor folded_bias, bool first, double rate,
                    double momentum, double decay, double scale) {
  const char* op = "update_folded_";
  check_float(op, "grad", grad);
  RIBFAST_CHECK_TYPE(grad.scalar_type() != at::kDouble, op, "grad in float32, float16 or bfloat16", "double");
  check_update(op, grad, weight);
  check_same_device(op, grad, weight);
  const int64_t rows = weight.size(0), n = rows ? weight.numel() / rows : 0;
  for (const at::Tensor* t : {&new_weight, &velocity}) check_like(op, "float32 states", *t, weight);
  check_like(op, "folded", folded, grad);
  if (anchor) check_like(op, "anchor", *anchor, grad);
  for (const at::Tensor* t : {&affine, &norm, static_cast<const at::Tensor*>(&new_affine),
                              static_cast<const at::Tensor*>(&affine_velocity)}) {
    RIBFAST_CHECK_VALUE(t->dim() == 2 && t->size(0) == 2 && t->size(1) == rows && t->is_contiguous() &&
                            t->scalar_type() == at::kFloat,
                        op, "contiguous float32 (2, O) tensors", t->sizes());
    check_same_device(op, *t, grad);
  }
  for (const at::Tensor* t : {&bias_grad, bias_anchor ? &*bias_anchor : &bias_grad,
                              static_cast<const at::Tensor*>(&folded_bias)}) {
    RIBFAST_CHECK_VALUE(t->dim() == 1 && t->size(0) == rows && t->is_contiguous(), op, "contiguous biases (O,)",
                        t->sizes());
    check_same_type(op, "biases", *t, grad);
  }
  const at::Tensor bias = bias_grad.to(at::kFloat);
  const at::Tensor more = bias_anchor ? bias_anchor->to(at::kFloat) : at::zeros({rows}, affine.options());
  const at::Tensor new_bias = at::empty({rows}, affine.options());
  const auto storage = storage_of(grad);
  const auto dot = kernels().folded_dot[storage];
  const auto move = kernels().folded_move[storage];
  const float *gammas = affine.const_data_ptr<float>(), *inverses = norm.const_data_ptr<float>();
  const float *biases = bias.const_data_ptr<float>(), *more_biases = more.const_data_ptr<float>();
  float *new_gammas = new_affine.data_ptr<float>(), *speeds = affine_velocity.data_ptr<float>();
  float* out_bias = new_bias.data_ptr<float>();
  const float unscale = static_cast<float>(1 / scale), r = static_cast<float>(rate);
  const float m = static_cast<float>(momentum), d = static_cast<float>(decay);
  const auto moved = [&](float parameter, float gradient, float& speed) {
    speed = gradient + d * parameter + (first ? 0.0f : m * speed);
    return parameter - r * speed;
  };
  at::parallel_for(0, rows, grain(n), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      const float inverse = inverses[o], mean = inverses[rows + o], gamma = gammas[o], beta = gammas[rows + o];
      const float for_beta = (biases[o] + more_biases[o]) * unscale;
      FoldedRow row{offset(grad, o * n),
                    anchor ? offset(*anchor, o * n) : nullptr,
                    weight.const_data_ptr<float>() + o * n,
                    new_weight.data_ptr<float>() + o * n,
                    velocity.data_ptr<float>() + o * n,
                    offset(folded, o * n),
                    n,
                    gamma * inverse * unscale,
                    0.0f,
                    r,
                    m,
                    d,
                    first};
      const float for_gamma = inverse * (dot(row) * unscale - mean * for_beta);
      new_gammas[o] = moved(gamma, for_gamma, speeds[o]);
      new_gammas[rows + o] = moved(beta, for_beta, speeds[rows + o]);
      row.folded_scale = new_gammas[o] * inverse;
      out_bias[o] = new_gammas[rows + o] - mean * row.folded_scale;
      move(row);
    }
  });
  folded_bias.copy_(new_bias);
}

}  // namespace
}  // namespace ribfast::cpu

TORCH_LIBRARY_IMPL(ribfast, CPU, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("activate_", &ribfast::cpu::activate_);
  m.impl("activate_backward", &ribfast::cpu::activate_backward);
  m.impl("update_folded_", &ribfast::cpu::update_folded_);
}
