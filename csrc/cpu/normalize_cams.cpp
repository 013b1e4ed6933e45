// normalize_cams on the CPU: threads over maps. The in-place form writes through cams of any strides.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../backend.h"
#include "../check.h"
#include "storage.h"

namespace ribfast::cpu {
namespace {

void normalize_into(const at::Tensor& cams, double eps, const at::Tensor& result) {
  const int64_t n = cams.size(-1) * cams.size(-2);
  const auto kernel = kernels().normalize[storage_of(cams)];
  at::parallel_for(0, cams.numel() / n, grain(n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel(offset(cams, i * n), n, eps, offset(result, i * n));
  });
}

at::Tensor normalize_cams(const at::Tensor& cams, double eps) {
  check_normalize_cams("normalize_cams", cams);
  const at::Tensor result = at::empty(cams.sizes(), cams.options());
  normalize_into(cams.contiguous(), eps, result);
  return result;
}

void normalize_cams_(const at::Tensor& cams, double eps) {
  check_normalize_cams("normalize_cams", cams);
  const at::Tensor dense = cams.contiguous();
  normalize_into(dense, eps, dense);
  if (!dense.is_same(cams)) cams.copy_(dense);
}

}  // namespace
}  // namespace ribfast::cpu

TORCH_LIBRARY_IMPL(ribfast, CPU, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("normalize_cams", &ribfast::cpu::normalize_cams);
  m.impl("normalize_cams_", [](at::Tensor cams, double eps) { ribfast::cpu::normalize_cams_(cams, eps); });
}
