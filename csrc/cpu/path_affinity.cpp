// path_affinity on the CPU: threads over images and rows, in its backward over images. The boundary of any float type
// and strides (copied); empty batches give empty results.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../backend.h"
#include "../check.h"
#include "pair_table.h"

namespace ribfast::cpu {
namespace {

at::Tensor path_affinity(const at::Tensor& boundary_, int64_t radius, double beta) {
  check_path_affinity("path_affinity", boundary_, radius, beta);
  const at::Tensor boundary = boundary_.to(at::kFloat).contiguous();
  const int64_t count = boundary.size(0), height = boundary.size(1), width = boundary.size(2);
  const Margins margins{height, width, 0, radius - 1};
  const Pairs pairs(radius, margins.stride());
  const PairTable table = pairs.table();
  const at::Tensor result = at::empty({count, table.count, height, width}, boundary.options());
  Buffer<float> planes;
  float* const plane = planes.get(std::max<int64_t>(1, count) * margins.size());
  const float* from = boundary.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  for (int64_t n = 0; n < count; ++n) copy_boundary(margins, from + n * height * width, plane + n * margins.size());
  const auto kernel = kernels().path_affinity;
  at::parallel_for(0, count * height, std::max<int64_t>(1, 256 / width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / height, y = i % height;
      kernel(table, plane + n * margins.size() + margins.origin() + y * margins.stride(), width, beta,
             out + (n * table.count * height + y) * width, height * width);
    }
  });
  return result;
}

at::Tensor path_affinity_backward(const at::Tensor& grad_, const at::Tensor& boundary_, int64_t radius, double beta) {
  check_path_affinity("path_affinity_backward", boundary_, radius, beta);
  check_pair_gradient(grad_, boundary_, radius);
  const at::Tensor boundary = boundary_.to(at::kFloat).contiguous(), grad = grad_.to(at::kFloat).contiguous();
  const int64_t count = boundary.size(0), height = boundary.size(1), width = boundary.size(2);
  const Margins margins{height, width, 0, radius - 1};
  const Pairs pairs(radius, margins.stride());
  const PairTable table = pairs.table();
  const at::Tensor result = at::empty(boundary.sizes(), boundary.options());
  const float *from = boundary.const_data_ptr<float>(), *grads = grad.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  const auto kernel = kernels().path_affinity_backward;
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> planes;
    float* const plane = planes.get(2 * margins.size());
    float* const sums = plane + margins.size();
    for (int64_t n = begin; n < end; ++n) {
      copy_boundary(margins, from + n * height * width, plane);
      std::fill(sums, sums + margins.size(), 0.0f);
      for (int64_t y = 0; y < height; ++y) {
        const int64_t at = margins.origin() + y * margins.stride();
        kernel(table, plane + at, width, beta, grads + (n * table.count * height + y) * width, height * width,
               sums + at);
      }
      margins.copy_back(sums, out + n * height * width);
    }
  });
  return result.to(boundary_.scalar_type());
}

}  // namespace
}  // namespace ribfast::cpu

TORCH_LIBRARY_IMPL(ribfast, CPU, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("path_affinity", &ribfast::cpu::path_affinity);
  m.impl("path_affinity_backward", &ribfast::cpu::path_affinity_backward);
}
