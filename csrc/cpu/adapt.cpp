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
  check_activate_(y, shortcut, mask, limit);
  const int64_t channels = y.size(1), cells = channels ? y.numel() / channels : 0;
  const auto kernel = kernels().activate[storage_of(y)];
  at::parallel_for(0, cells, grain(channels), [&](int64_t begin, int64_t end) {
    kernel(offset(y, begin * channels), shortcut ? offset(*shortcut, begin * channels) : nullptr,
           mask ? offset(*mask, begin) : nullptr, end - begin, channels, limit);
  });
}

std::tuple<at::Tensor, at::Tensor> activate_backward(const at::Tensor& grad, const at::Tensor& y, double limit) {
  check_activate_backward(grad, y, limit);
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
                    at::Tensor affine_velocity, at::Tensor folded, at::Tensor folded_bias, bool first,
                    const at::Tensor& rate, double momentum, double decay, double scale) {
  check_update_folded_(grad, bias_grad, anchor, bias_anchor, weight, affine, norm, new_weight, new_affine, velocity,
                       affine_velocity, folded, folded_bias, rate);
  const int64_t rows = weight.size(0), n = rows ? weight.numel() / rows : 0;
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
  const float unscale = static_cast<float>(1 / scale), r = *rate.const_data_ptr<float>();
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
