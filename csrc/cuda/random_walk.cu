// random_walk on CUDA: kernels in random_walk.cuh. Images are packed into launches as many as their descriptions fit
// the argument; cams and weights of any float type and strides (copied).
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../backend.h"
#include "../walk_series.h"
#include "launch.h"
#include "random_walk.cuh"

namespace ribfast::cuda {
namespace {

template <int kReach, int kClasses, int kEntries>
void launch(const std::vector<WalkEntry>& entries, int radius, const WalkSeries& series) {
  const OnStream run{c10::cuda::getCurrentCUDAStream()};
  const bool plain = series.factors.empty();
  for (size_t first = 0; first < entries.size(); first += kEntries) {
    WalkBatch<kEntries> batch;
    batch.count = static_cast<int32_t>(std::min<size_t>(kEntries, entries.size() - first)), batch.radius = radius;
    int64_t blocks = 0;
    for (int i = 0; i < batch.count; ++i) {
      batch.entries[i] = entries[first + i];
      batch.entries[i].first_block = checked_grid("random_walk", blocks);
      blocks += walk_blocks(batch.entries[i].height, batch.entries[i].width);
    }
    const dim3 grid(checked_grid("random_walk", blocks));
    run(walk_begin_kernel<kEntries>, grid, kWalkPixels, batch, plain ? 0.0f : static_cast<float>(series.factors[0]));
    for (int64_t k = 1; k <= series.applications; ++k) {
      const float factor = plain ? 0.0f : static_cast<float>(series.factors[k]);
      run(walk_step_kernel<kReach, kClasses, kEntries>, grid, kWalkPixels, batch, k % 2 == 1, !plain && k > 1, factor);
    }
  }
}

template <int kReach, int kClasses>
void launch_many(const std::vector<WalkEntry>& entries, int radius, const WalkSeries& series) {
  constexpr int kFew = 8;
  if (entries.size() <= kFew) {
    launch<kReach, kClasses, kFew>(entries, radius, series);
  } else {
    launch<kReach, kClasses, entries_per_launch<WalkEntry>()>(entries, radius, series);
  }
}

template <int kReach>
void launch_reach(const std::vector<WalkEntry>& entries, int classes, int radius, const WalkSeries& series) {
  if (classes == 1) return launch_many<kReach, 1>(entries, radius, series);
  if (classes == 2) return launch_many<kReach, 2>(entries, radius, series);
  launch_many<kReach, kWalkClasses>(entries, radius, series);
}

std::vector<at::Tensor> random_walk(at::TensorList cams, at::TensorList weights, int64_t radius, int64_t steps) {
  const char* op = "random_walk";
  RIBFAST_CHECK_VALUE(cams.size() == weights.size(), op, "weights for each image's cams", weights.size(), " and ",
                      cams.size());
  if (cams.empty()) return {};
  const c10::cuda::CUDAGuard guard(cams[0].device());
  const WalkSeries series = walk_series(steps, kWalkTolerance);
  const bool plain = series.factors.empty();
  std::vector<at::Tensor> results, kept;  // kept: until the launches are queued
  std::vector<WalkEntry> entries;
  int most = 1;
  for (size_t i = 0; i < cams.size(); ++i) {
    check_random_walk(op, cams[i], weights[i], radius, steps);
    check_same_device(op, cams[0], cams[i]);
    const at::Tensor dense = cams[i].to(at::kFloat).contiguous(), weight = weights[i].to(at::kFloat).contiguous();
    const int64_t height = dense.size(1), width = dense.size(2), n = height * width;
    at::Tensor even = at::empty(dense.sizes(), dense.options()), odd = at::empty(dense.sizes(), dense.options());
    at::Tensor sum = plain ? at::Tensor() : at::empty(dense.sizes(), dense.options());
    results.push_back(plain ? (steps % 2 == 0 ? even : odd) : sum);
    kept.insert(kept.end(), {dense, weight, even, odd});
    for (int64_t c = 0; c < dense.size(0); c += kWalkClasses) {
      const auto classes = static_cast<int32_t>(std::min<int64_t>(kWalkClasses, dense.size(0) - c));
      // each entry has column sums of its own: it need not wait for another
      at::Tensor inverse = at::empty({height, width}, dense.options());
      kept.push_back(inverse);
      entries.push_back({dense.const_data_ptr<float>() + c * n, weight.const_data_ptr<float>(),
                         even.data_ptr<float>() + c * n, odd.data_ptr<float>() + c * n,
                         plain ? nullptr : sum.data_ptr<float>() + c * n, inverse.data_ptr<float>(), classes,
                         static_cast<int32_t>(height), static_cast<int32_t>(width), 0});
      most = std::max(most, classes);
    }
  }
  if (entries.empty()) return results;
  if (radius <= 5) {
    launch_reach<4>(entries, most, static_cast<int>(radius), series);
  } else {
    launch_reach<kLargestRadius - 1>(entries, most, static_cast<int>(radius), series);
  }
  return results;
}

}  // namespace
}  // namespace ribfast::cuda

TORCH_LIBRARY_IMPL(ribfast, CUDA, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("random_walk", &ribfast::cuda::random_walk);
}
