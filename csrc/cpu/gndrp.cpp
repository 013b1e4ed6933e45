// gndrp on the CPU: one map after another, each read twice from the first-level cache where it fits there, threads
// over maps. Maps of any strides (copied where not contiguous); N = 0 or C = 0 gives empty results.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../backend.h"
#include "../check.h"
#include "storage.h"

namespace ribfast::cpu {
namespace {

std::tuple<at::Tensor, at::Tensor> gndrp(const at::Tensor& maps_, const at::Tensor& present_, double tau,
                                         bool divide_by_all, bool strict) {
  check_gndrp("gndrp", maps_, present_);
  const at::Tensor maps = maps_.contiguous(), present = present_.contiguous();
  const int64_t count = maps.size(0) * maps.size(1), n = maps.size(2) * maps.size(3);
  const auto options = maps.options().dtype(accumulator_type(maps.scalar_type()));
  const at::Tensor pooled = at::empty({maps.size(0), maps.size(1)}, options);
  const at::Tensor stats = at::empty({maps.size(0), maps.size(1), 2}, options);
  const auto kernel = kernels().gndrp[storage_of(maps)];
  const bool* is_present = present.const_data_ptr<bool>();
  at::parallel_for(0, count, grain(n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernel(offset(maps, i * n), n, is_present[i], tau, divide_by_all, strict, offset(pooled, i),
             offset(stats, 2 * i));
    }
  });
  return {pooled, stats};
}

at::Tensor gndrp_backward(const at::Tensor& grad_, const at::Tensor& maps_, const at::Tensor& present_,
                          const at::Tensor& stats_, double tau, bool strict) {
  check_gndrp("gndrp_backward", maps_, present_);
  check_gndrp_backward(grad_, maps_, present_, stats_);
  const at::Tensor maps = maps_.contiguous(), present = present_.contiguous(), stats = stats_.contiguous(),
                   grad = grad_.to(stats_.scalar_type()).contiguous();
  const int64_t count = maps.size(0) * maps.size(1), n = maps.size(2) * maps.size(3);
  const at::Tensor result = at::empty(maps.sizes(), maps.options());
  const auto kernel = kernels().gndrp_backward[storage_of(maps)];
  const bool* is_present = present.const_data_ptr<bool>();
  at::parallel_for(0, count, grain(n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernel(offset(maps, i * n), n, is_present[i], tau, strict, offset(stats, 2 * i), offset(grad, i),
             offset(result, i * n));
    }
  });
  return result;
}

}  // namespace
}  // namespace ribfast::cpu

TORCH_LIBRARY_IMPL(ribfast, CPU, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("gndrp", &ribfast::cpu::gndrp);
  m.impl("gndrp_backward", &ribfast::cpu::gndrp_backward);
}
