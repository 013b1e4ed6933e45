// accumulate_cams on the CPU: threads over images, classes and bands of rows; the output is written once, beside it
// only the interpolation tables and a few rows a thread are allocated.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "../backend.h"
#include "../check.h"
#include "storage.h"
#include "taps.h"

namespace ribfast::cpu {
namespace {

// What the kernels need of one image, and how its work is cut into jobs.
struct Plan {
  std::vector<Taps> rows, columns;
  std::vector<CamScale> scales;
  int64_t padded_width = 0, widest = 0;
  int64_t first_job = 0, bands = 1;

  explicit Plan(const CamImage& image) : rows(image.scales.size()), columns(image.scales.size()) {
    // an odd number of blocks: rows a power of two apart would meet in one set of the cache
    padded_width = ((image.width + kColumnBlock - 1) / kColumnBlock | 1) * kColumnBlock;
    for (size_t s = 0; s < image.scales.size(); ++s) {
      const at::Tensor& map = image.scales[s];
      const int64_t h = map.size(2), w = map.size(3);
      if (map.scalar_type() == at::kDouble) {
        rows[s].fill<double>(image.height, image.height, h, image.padded_height);
        columns[s].fill<double>(image.width, padded_width, w, image.padded_width);
      } else {
        rows[s].fill<float>(image.height, image.height, h, image.padded_height);
        columns[s].fill<float>(image.width, padded_width, w, image.padded_width);
      }
      scales.push_back({nullptr, map.size(0) == 2 ? map.size(1) * h * w : 0, static_cast<int32_t>(h),
                        static_cast<int32_t>(w), rows[s].cell.data(), rows[s].t.data(), columns[s].cell.data(),
                        columns[s].t.data()});
      widest = std::max(widest, w);
    }
  }

  int64_t scratch(const at::Tensor& map) const {
    return cam_scratch(static_cast<int64_t>(scales.size()), padded_width, widest,
                       map.scalar_type() == at::kDouble ? sizeof(double) : sizeof(float));
  }
};

void accumulate_into(at::TensorList out, const std::vector<CamImage>& images, bool relu, bool add) {
  std::vector<Plan> plans(images.begin(), images.end());
  int64_t channels = 0, jobs = 0, pixels = 0;
  for (const CamImage& image : images) channels += image.channels;
  for (size_t i = 0; i < images.size(); ++i) {
    // bands: with fewer classes than threads, rows are shared out too
    const int64_t wanted = (2 * at::get_num_threads() + channels - 1) / std::max<int64_t>(1, channels);
    plans[i].bands = std::clamp<int64_t>(wanted, 1, (images[i].height + 31) / 32);
    plans[i].first_job = jobs;
    jobs += images[i].channels * plans[i].bands;
    pixels += out[i].numel();
  }
  if (jobs == 0) return;
  at::parallel_for(0, jobs, grain(pixels / jobs), [&](int64_t begin, int64_t end) {
    std::vector<char> scratch;
    std::vector<CamScale> scales;
    size_t i = 0;
    for (int64_t job = begin; job < end; ++job) {
      while (i + 1 < images.size() && job >= plans[i + 1].first_job) ++i;
      const CamImage& image = images[i];
      const Plan& plan = plans[i];
      const int64_t channel = (job - plan.first_job) / plan.bands, band = (job - plan.first_job) % plan.bands;
      scratch.resize(std::max<size_t>(scratch.size(), plan.scratch(image.scales[0])));
      scales = plan.scales;
      for (size_t s = 0; s < scales.size(); ++s) {
        scales[s].map = offset(image.scales[s], channel * scales[s].height * scales[s].width);
      }
      kernels().accumulate[storage_of(image.scales[0])](
          {scales.data(), static_cast<int32_t>(scales.size()), image.height * band / plan.bands,
           image.height * (band + 1) / plan.bands, image.width, plan.padded_width, relu, scratch.data()},
          offset(out[i], channel * image.height * image.width), add);
    }
  });
}

std::vector<at::Tensor> accumulate_cams(at::TensorList maps, at::IntArrayRef counts, at::IntArrayRef sizes,
                                        at::IntArrayRef padded, bool relu) {
  const auto images = check_accumulate_cams("accumulate_cams", maps, counts, sizes, padded);
  const std::vector<at::Tensor> out = empty_cams(images);
  accumulate_into(out, images, relu, false);
  return out;
}

void accumulate_cams_(at::TensorList out, at::TensorList maps, at::IntArrayRef counts, at::IntArrayRef padded,
                      bool relu) {
  const auto images = check_accumulate_cams("accumulate_cams", maps, counts, sizes_of(out), padded);
  check_cam_targets("accumulate_cams", out, images);
  check_apart("accumulate_cams", out, maps);
  std::vector<at::Tensor> dense;
  for (const at::Tensor& target : out) dense.push_back(target.contiguous());
  accumulate_into(dense, images, relu, true);
  for (size_t i = 0; i < dense.size(); ++i) {
    if (!dense[i].is_same(out[i])) out[i].copy_(dense[i]);
  }
}

std::vector<at::Tensor> accumulate_cams_backward(at::TensorList grads_, at::TensorList maps, at::IntArrayRef counts,
                                                 at::IntArrayRef padded, bool relu) {
  const auto images = check_accumulate_cams("accumulate_cams_backward", maps, counts, sizes_of(grads_), padded);
  check_cam_targets("accumulate_cams_backward", grads_, images);
  std::vector<at::Tensor> grads, results;
  for (const at::Tensor& grad : grads_) grads.push_back(grad.contiguous());
  struct Job {
    size_t image, scale, result;
    int64_t channel;
  };
  std::vector<Job> jobs;
  std::vector<Plan> plans(images.begin(), images.end());
  for (size_t i = 0; i < images.size(); ++i) {
    for (size_t s = 0; s < images[i].scales.size(); ++s) {
      const at::Tensor& map = images[i].scales[s];
      results.push_back(at::empty(map.sizes(), map.options()));
    }
    for (int64_t channel = 0; channel < images[i].channels; ++channel) {
      for (size_t s = 0; s < images[i].scales.size(); ++s) {
        jobs.push_back({i, s, results.size() - images[i].scales.size() + s, channel});
      }
    }
  }
  at::parallel_for(0, static_cast<int64_t>(jobs.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<char> scratch;
    for (int64_t j = begin; j < end; ++j) {
      const Job& job = jobs[j];
      const CamImage& image = images[job.image];
      const Plan& plan = plans[job.image];
      scratch.resize(std::max<size_t>(scratch.size(), plan.scratch(image.scales[0])));
      CamScale scale = plan.scales[job.scale];
      const int64_t first = job.channel * scale.height * scale.width;
      scale.map = offset(image.scales[job.scale], first);
      kernels().accumulate_backward[storage_of(image.scales[0])](
          {&scale, 1, 0, image.height, image.width, plan.padded_width, relu, scratch.data()},
          offset(grads[job.image], job.channel * image.height * image.width), offset(results[job.result], first));
    }
  });
  return results;
}

}  // namespace
}  // namespace ribfast::cpu

TORCH_LIBRARY_IMPL(ribfast, CPU, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("accumulate_cams", &ribfast::cpu::accumulate_cams);
  m.impl("accumulate_cams_", &ribfast::cpu::accumulate_cams_);
  m.impl("accumulate_cams_backward", &ribfast::cpu::accumulate_cams_backward);
}
