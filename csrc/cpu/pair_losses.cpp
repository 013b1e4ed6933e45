// pair_losses on the CPU: threads over images and strips of rows, in its backward over images. Boundary and
// displacement of any float type and strides (copied); sums are held in double.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <vector>

#include "../backend.h"
#include "../check.h"
#include "pair_table.h"

namespace ribfast::cpu {
namespace {

// The maps of one image among margins.
class Planes {
 public:
  Planes(const Margins& margins, const float* boundary, const float* displacement, const uint8_t* labels)
      : margins_(margins) {
    const int64_t n = margins.height * margins.width, size = margins.size();
    float* planes = floats_.get(3 * size);
    copy_boundary(margins, boundary, planes);
    margins.copy(displacement, 0.0f, planes + size);
    margins.copy(displacement + n, 0.0f, planes + 2 * size);
    margins.copy(labels, int32_t{255}, labels_.get(size));
  }

  PairRow row(int64_t y) const {
    const int64_t at = margins_.origin() + y * margins_.stride(), size = margins_.size();
    const float* planes = floats_.data();
    return {planes + at, planes + size + at, planes + 2 * size + at, labels_.data() + at, margins_.width};
  }

 private:
  Margins margins_;
  Buffer<float> floats_;
  Buffer<int32_t> labels_;
};

at::Tensor pair_losses(const at::Tensor& boundary_, const at::Tensor& displacement_, const at::Tensor& labels_,
                       int64_t radius) {
  check_pair_losses("pair_losses", boundary_, displacement_, labels_, radius);
  const at::Tensor boundary = boundary_.to(at::kFloat).contiguous(), labels = labels_.contiguous(),
                   displacement = displacement_.to(at::kFloat).contiguous();
  const int64_t count = boundary.size(0), height = boundary.size(1), width = boundary.size(2), n = height * width;
  const Margins margins{height, width, 0, radius - 1};
  const Pairs pairs(radius, margins.stride());
  const PairTable table = pairs.table();
  const auto kernel = kernels().pair_losses;
  constexpr int64_t kRows = 16;  // of a strip: sums are those of strips in their order, whatever the threads
  const int64_t rows = std::max<int64_t>(0, height - (radius - 1)), strips = (rows + kRows - 1) / kRows;
  std::vector<std::array<double, 8>> sums(count * strips);
  at::parallel_for(0, count * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t image = i / strips;
      const Planes planes(margins, boundary.const_data_ptr<float>() + image * n,
                          displacement.const_data_ptr<float>() + 2 * image * n,
                          labels.const_data_ptr<uint8_t>() + image * n);
      for (; i < end && i / strips == image; ++i) {
        sums[i].fill(0);
        for (int64_t y = i % strips * kRows; y < std::min(rows, (i % strips + 1) * kRows); ++y) {
          kernel(table, planes.row(y), sums[i].data());
        }
      }
    }
  });
  const at::Tensor result = at::empty({8}, boundary.options());
  for (int k = 0; k < 8; ++k) {
    double total = 0;
    for (const auto& strip : sums) total += strip[k];
    result.mutable_data_ptr<float>()[k] = static_cast<float>(total);
  }
  return result;
}

std::tuple<at::Tensor, at::Tensor> pair_losses_backward(const at::Tensor& grad_, const at::Tensor& boundary_,
                                                        const at::Tensor& displacement_, const at::Tensor& labels_,
                                                        int64_t radius) {
  check_pair_losses("pair_losses_backward", boundary_, displacement_, labels_, radius);
  check_loss_gradient(grad_, boundary_);
  const at::Tensor boundary = boundary_.to(at::kFloat).contiguous(), labels = labels_.contiguous(),
                   displacement = displacement_.to(at::kFloat).contiguous(), grad = grad_.to(at::kFloat).contiguous();
  const int64_t count = boundary.size(0), height = boundary.size(1), width = boundary.size(2), n = height * width;
  const Margins margins{height, width, 0, radius - 1};
  const Pairs pairs(radius, margins.stride());
  const PairTable table = pairs.table();
  const auto kernel = kernels().pair_losses_backward;
  const at::Tensor to_boundary = at::empty(boundary.sizes(), boundary.options());
  const at::Tensor to_displacement = at::empty(displacement.sizes(), displacement.options());
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> buffer;
    const int64_t size = margins.size();
    float* const sums = buffer.get(3 * size);
    for (int64_t image = begin; image < end; ++image) {
      const Planes planes(margins, boundary.const_data_ptr<float>() + image * n,
                          displacement.const_data_ptr<float>() + 2 * image * n,
                          labels.const_data_ptr<uint8_t>() + image * n);
      std::fill(sums, sums + 3 * size, 0.0f);
      for (int64_t y = 0; y < height - (radius - 1); ++y) {
        float* const at = sums + margins.origin() + y * margins.stride();
        kernel(table, planes.row(y), grad.const_data_ptr<float>(), at, at + size, at + 2 * size);
      }
      margins.copy_back(sums, to_boundary.mutable_data_ptr<float>() + image * n);
      margins.copy_back(sums + size, to_displacement.mutable_data_ptr<float>() + 2 * image * n);
      margins.copy_back(sums + 2 * size, to_displacement.mutable_data_ptr<float>() + (2 * image + 1) * n);
    }
  });
  return {to_boundary.to(boundary_.scalar_type()), to_displacement.to(displacement_.scalar_type())};
}

}  // namespace
}  // namespace ribfast::cpu

TORCH_LIBRARY_IMPL(ribfast, CPU, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("pair_losses", &ribfast::cpu::pair_losses);
  m.impl("pair_losses_backward", &ribfast::cpu::pair_losses_backward);
}
