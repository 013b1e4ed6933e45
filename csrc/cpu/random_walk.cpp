// random_walk on the CPU. T = W / its columns' sums, W symmetric: a step is, at each pixel, the mean of its neighbours
// by their weights. The weights of the pairs (half of W) lie row by row with zeros between, so that one vector loop
// serves all pixels; classes go through them kClassesTogether at a time. Threads over images and classes, or within
// an image over rows where there are fewer.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../backend.h"
#include "../check.h"
#include "../walk_series.h"
#include "pair_table.h"

namespace ribfast::cpu {
namespace {

// An image's weights and column sums, as WalkJob has them.
class Graph {
 public:
  Graph(const float* weights, int64_t radius, int64_t height, int64_t width)
      : margins{height, width, radius - 1, radius - 1}, pairs_(radius, margins.stride()) {
    const PairTable table = pairs_.table();
    const int64_t n = height * width, strip = margins.rounded() + kMargin, rows = height + radius - 1;
    const int64_t size = kMargin + rows * table.count * strip;
    float* const all = weights_.get(size + margins.size());
    std::fill(all, all + size + margins.size(), 0.0f);
    float* const first = all + kMargin + (radius - 1) * table.count * strip;
    float* const inverses = all + size + margins.origin();
    Buffer<double> buffer;
    double* const sums = buffer.get(n);
    std::fill(sums, sums + n, 1.0);
    for (int64_t y = 0; y < height; ++y) {
      for (int64_t p = 0; p < table.count; ++p) {
        const int64_t dy = table.y[p], dx = table.x[p];
        if (y + dy >= height) continue;
        float* const to = first + (y * table.count + p) * strip;
        const float* const from = weights + p * n + y * width;
        const int64_t end = std::min(width, width - dx);
        double *const here = sums + y * width, *const there = sums + (y + dy) * width + dx;
        for (int64_t x = std::max<int64_t>(0, -dx); x < end; ++x) {
          to[x] = from[x] < kSmallest ? 0.0f : from[x];
          here[x] += to[x], there[x] += to[x];
        }
      }
    }
    for (int64_t y = 0; y < height; ++y) {
      for (int64_t x = 0; x < width; ++x) {
        inverses[y * margins.stride() + x] = static_cast<float>(1 / sums[y * width + x]);
      }
    }
    job = {first, inverses, nullptr, nullptr, nullptr, table.y, table.x, table.count, strip, margins.stride(),
           margins.size(), width, 0.0f, false};
  }

  Margins margins;
  WalkJob job;

 private:
  // a weight beside the diagonal's 1 that changes nothing in float32, and would be slow if it were subnormal
  static constexpr float kSmallest = 1e-30f;
  Pairs pairs_;
  Buffer<float> weights_;
};

// cams and result: `classes` maps (height, width) contiguous.
void run(const Graph& graph, const WalkSeries& series, const float* cams, int64_t classes, bool threads,
         float* result) {
  const Margins& margins = graph.margins;
  const int64_t n = margins.height * margins.width, size = margins.size();
  const auto kernel = kernels().walk[classes - 1];
  const bool plain = series.factors.empty();
  Buffer<float> buffer;
  float* current = buffer.get(3 * classes * size);
  float *next = current + classes * size, *sum = next + classes * size;
  std::fill(next, sum + classes * size, 0.0f);
  for (int64_t c = 0; c < classes; ++c) margins.copy(cams + c * n, 0.0f, current + c * size);
  if (!plain) {
    const auto factor = static_cast<float>(series.factors[0]);
    for (int64_t i = 0; i < classes * size; ++i) sum[i] = factor * current[i];
  }
  WalkJob job = graph.job;
  for (int64_t k = 1; k <= series.applications; ++k) {
    const double factor = plain ? 0 : series.factors[k];
    job.current = current + margins.origin(), job.next = next + margins.origin();
    job.result = factor == 0 ? nullptr : sum + margins.origin();
    job.factor = static_cast<float>(factor), job.twice = !plain && k > 1;
    if (threads) {
      at::parallel_for(0, margins.height, 1, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
    } else {
      kernel(job, 0, margins.height);
    }
    std::swap(current, next);
  }
  for (int64_t c = 0; c < classes; ++c) margins.copy_back((plain ? current : sum) + c * size, result + c * n);
}

std::vector<at::Tensor> random_walk(at::TensorList cams, at::TensorList weights, int64_t radius, int64_t steps) {
  const char* op = "random_walk";
  RIBFAST_CHECK_VALUE(cams.size() == weights.size(), op, "weights for each image's cams", weights.size(), " and ",
                      cams.size());
  std::vector<at::Tensor> dense, dense_weights, results;
  for (size_t i = 0; i < cams.size(); ++i) {
    check_random_walk(op, cams[i], weights[i], radius, steps);
    dense.push_back(cams[i].to(at::kFloat).contiguous());
    dense_weights.push_back(weights[i].to(at::kFloat).contiguous());
    results.push_back(at::empty(cams[i].sizes(), dense[i].options()));
  }
  const WalkSeries series = walk_series(steps, kWalkTolerance);
  const auto one = [&](int64_t i, bool threads) {
    const int64_t classes = cams[i].size(0), height = cams[i].size(1), width = cams[i].size(2), n = height * width;
    if (classes == 0) return;
    const Graph graph(dense_weights[i].const_data_ptr<float>(), radius, height, width);
    for (int64_t c = 0; c < classes; c += kClassesTogether) {
      run(graph, series, dense[i].const_data_ptr<float>() + c * n, std::min<int64_t>(kClassesTogether, classes - c),
          threads, results[i].mutable_data_ptr<float>() + c * n);
    }
  };
  const auto count = static_cast<int64_t>(cams.size());
  if (count < at::get_num_threads()) {
    for (int64_t i = 0; i < count; ++i) one(i, true);
  } else {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) one(i, false);
    });
  }
  return results;
}

}  // namespace
}  // namespace ribfast::cpu

TORCH_LIBRARY_IMPL(ribfast, CPU, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("random_walk", &ribfast::cpu::random_walk);
}
