// refine on the CPU: an image's weights once, then its maps from one buffer of padded rows to another. Threads over
// images, and over rows where there are fewer images than threads. Any strides and dtypes (copied to dense float32);
// N = 0 or C = 0 gives empty results. Scratch: 4 bytes a pixel for each neighbour and twice for each class.
#include "../refine.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "../check.h"
#include "buffer.h"
#include "storage.h"

namespace ribfast::cpu {
namespace {

static_assert(kMostNeighbours == kMostRefineNeighbours);

struct Refinement {
  std::vector<int64_t> dilations;
  float position[kMostNeighbours];
  bool pamr;
  float w1;
  int64_t iterations;
};

// One image: (3, height, width), maps and result (classes, height, width).
struct RefineImage {
  const float *image, *maps;
  float* result;
  int64_t classes, height, width;
};

// Where the neighbours are, and how rows are padded: what lies beyond the image's width is as far as the width.
class Rows {
 public:
  Rows(const Refinement& options, const RefineImage& image) {
    int32_t reach = 0;
    for (const int64_t d : options.dilations) {
      const auto dy = static_cast<int32_t>(std::min(d, image.height));
      const auto dx = static_cast<int32_t>(std::min(d, image.width));
      for (int k = 0; k < kAround; ++k) {
        rows_.push_back(kAroundRows[k] * dy);
        columns_.push_back(kAroundColumns[k] * dx);
      }
      reach = std::max(reach, dx);
    }
    constexpr int64_t kLine = kCacheLine / sizeof(float);
    const auto rounded = [](int64_t n) { return (n + kLine - 1) / kLine * kLine; };
    margin_ = rounded(reach);
    right_ = rounded(image.width) + margin_;
    job_.neighbours = static_cast<int32_t>(rows_.size());
    job_.rows = rows_.data(), job_.columns = columns_.data();
    job_.position = options.pamr ? nullptr : options.position, job_.w1 = options.w1;
    job_.height = image.height, job_.width = image.width;
    // an odd number of cache lines: rows 2, 4, 8 apart are then not in the same sets of the cache
    job_.stride = margin_ + right_ + (((margin_ + right_) / kLine) % 2 == 0 ? kLine : 0);
    job_.plane = job_.height * job_.stride;
    weights_ = rounded(image.width) * job_.neighbours;
  }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  const RefineJob& job() const { return job_; }
  int64_t weights() const { return weights_; }  // of a row
  // The first pixel of planes in new memory.
  float* planes(Buffer<float>& memory, int64_t count) const { return memory.get(count * job_.plane) + margin_; }

  // Copies of the row's first and last pixel around it.
  void pad(float* row) const {
    std::fill(row - margin_, row, row[0]);
    std::fill(row + job_.width, row + right_, row[job_.width - 1]);
  }
  void copy_row(const float* from, int64_t planes, int64_t row, float* to) const {
    for (int64_t c = 0; c < planes; ++c) {
      float* own = to + c * job_.plane + row * job_.stride;
      std::memcpy(own, from + (c * job_.height + row) * job_.width, job_.width * sizeof(float));
      pad(own);
    }
  }

 private:
  std::vector<int32_t> rows_, columns_;
  RefineJob job_;
  int64_t margin_, right_, weights_;
};

void refine_image(const Refinement& options, const RefineImage& image) {
  const int64_t size = image.height * image.width;
  if (image.classes == 0) return;
  if (options.iterations == 0) {
    std::memcpy(image.result, image.maps, image.classes * size * sizeof(float));
    return;
  }
  const Kernels& chosen = kernels();
  const Rows rows(options, image);
  const RefineJob& job = rows.job();
  Buffer<float> colours, first, second, all_weights;
  float *image_planes = rows.planes(colours, 3), *in = rows.planes(first, image.classes);
  float* out = options.iterations > 1 ? rows.planes(second, image.classes) : nullptr;
  float* weights = all_weights.get(job.height * rows.weights());
  at::parallel_for(0, job.height, grain(job.width), [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y) {
      rows.copy_row(image.image, 3, y, image_planes);
      rows.copy_row(image.maps, image.classes, y, in);
    }
  });
  const int64_t work = job.width * job.neighbours;
  for (int64_t i = 0; i < options.iterations; ++i) {
    const bool last = i + 1 == options.iterations;
    at::parallel_for(0, job.height, grain(work), [&](int64_t begin, int64_t end) {
      for (int64_t y = begin; y < end; ++y) {
        float* own = weights + y * rows.weights();
        if (i == 0) chosen.affinities(job, image_planes, y, own);
        if (last) {
          chosen.refine_row(job, in, own, image.classes, y, image.result + y * job.width, size);
          continue;
        }
        float* to = out + y * job.stride;
        chosen.refine_row(job, in, own, image.classes, y, to, job.plane);
        for (int64_t c = 0; c < image.classes; ++c) rows.pad(to + c * job.plane);
      }
    });
    std::swap(in, out);
  }
}

std::vector<at::Tensor> refine(at::TensorList images, at::TensorList maps, bool pamr, at::IntArrayRef dilations,
                               int64_t iterations, double w1, double w2) {
  check_refine(images, maps, dilations, iterations, w1, w2);
  Refinement options{dilations.vec(), {}, pamr, static_cast<float>(w1), iterations};
  position_weights(dilations.data(), static_cast<int64_t>(dilations.size()), w1, w2, options.position);
  std::vector<at::Tensor> results, dense;  // dense: what the jobs point to
  std::vector<RefineImage> jobs;
  for (size_t i = 0; i < maps.size(); ++i) {
    dense.push_back(images[i].to(at::kFloat).contiguous());
    dense.push_back(maps[i].to(at::kFloat).contiguous());
    const at::Tensor &image = dense[2 * i], &map = dense[2 * i + 1];
    results.push_back(at::empty(map.sizes(), map.options()));
    const int64_t classes = map.size(1), size = map.size(2) * map.size(3);
    for (int64_t n = 0; n < map.size(0); ++n) {
      jobs.push_back({image.const_data_ptr<float>() + n * 3 * size, map.const_data_ptr<float>() + n * classes * size,
                      results[i].mutable_data_ptr<float>() + n * classes * size, classes, map.size(2), map.size(3)});
    }
  }
  const auto count = static_cast<int64_t>(jobs.size());
  if (count < at::get_num_threads()) {
    for (const RefineImage& job : jobs) refine_image(options, job);
  } else {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) refine_image(options, jobs[i]);
    });
  }
  return results;
}

}  // namespace
}  // namespace ribfast::cpu

TORCH_LIBRARY_IMPL(ribfast, CPU, m) { m.impl("refine", &ribfast::cpu::refine); }
