// accumulate_cams on CUDA: kernels in accumulate_cams.cuh. Images are packed into launches as many as their
// descriptions fit the argument; an image with more than kScales scales is added up over several launches.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../backend.h"
#include "accumulate_cams.cuh"
#include "launch.h"

namespace ribfast::cuda {
namespace {

int64_t view_stride(const at::Tensor& map) { return map.size(0) == 2 ? map.stride(0) : 0; }

template <typename T, int kImages>
void launch(const std::vector<CamImage>& entries, bool relu, bool add) {
  for (size_t first = 0; first < entries.size(); first += kImages) {
    CamBatch<kImages> batch;
    batch.count = static_cast<int32_t>(std::min<size_t>(kImages, entries.size() - first));
    batch.relu = relu, batch.add = add;
    int64_t blocks = 0;
    for (int i = 0; i < batch.count; ++i) {
      batch.images[i] = entries[first + i];
      batch.images[i].first_block = checked_grid("accumulate_cams", blocks);
      blocks += accumulate_blocks(entries[first + i]);
    }
    accumulate_kernel<T, kImages><<<checked_grid("accumulate_cams", blocks), kWarp * kSweepWarps, 0,
                                    c10::cuda::getCurrentCUDAStream()>>>(batch);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

template <typename T, int kEntries>
void launch_backward(const std::vector<CamGradient>& entries, bool relu) {
  for (size_t first = 0; first < entries.size(); first += kEntries) {
    CamGradients<kEntries> batch;
    batch.count = static_cast<int32_t>(std::min<size_t>(kEntries, entries.size() - first));
    batch.relu = relu;
    int64_t blocks = 0;
    for (int i = 0; i < batch.count; ++i) {
      batch.entries[i] = entries[first + i];
      batch.entries[i].first_block = checked_grid("accumulate_cams_backward", blocks);
      blocks += accumulate_backward_blocks(entries[first + i]);
    }
    accumulate_backward_kernel<T, kEntries><<<checked_grid("accumulate_cams_backward", blocks), kWarp * kGatherWarps,
                                              0, c10::cuda::getCurrentCUDAStream()>>>(batch);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

void accumulate_into(at::TensorList out, const std::vector<ribfast::CamImage>& images, bool relu, bool add) {
  // round r holds scales r kScales ... of every image that has that many
  for (size_t first = 0, more = 1; more; first += kScales, add = true) {
    std::vector<CamImage> entries;
    more = 0;
    for (size_t i = 0; i < images.size(); ++i) {
      const auto& scales = images[i].scales;
      if (scales.size() <= first || out[i].numel() == 0) continue;
      more += scales.size() > first + kScales;
      CamImage entry{};
      entry.count = static_cast<int32_t>(std::min<size_t>(kScales, scales.size() - first));
      for (int s = 0; s < entry.count; ++s) {
        const at::Tensor& map = scales[first + s];
        entry.scales[s] = {map.const_data_ptr(), view_stride(map), static_cast<int32_t>(map.size(2)),
                           static_cast<int32_t>(map.size(3))};
      }
      entry.out = out[i].data_ptr();
      entry.channels = static_cast<int32_t>(images[i].channels);
      entry.height = static_cast<int32_t>(images[i].height), entry.width = static_cast<int32_t>(images[i].width);
      entry.padded_height = static_cast<int32_t>(images[i].padded_height);
      entry.padded_width = static_cast<int32_t>(images[i].padded_width);
      entries.push_back(entry);
    }
    if (entries.empty()) return;
    with_element(images[0].scales[0], [&](auto element) {
      using T = decltype(element);
      if (entries.size() == 1) {
        launch<T, 1>(entries, relu, add);
      } else {
        launch<T, entries_per_launch<CamImage>()>(entries, relu, add);
      }
    });
  }
}

std::vector<at::Tensor> accumulate_cams(at::TensorList maps, at::IntArrayRef counts, at::IntArrayRef sizes,
                                        at::IntArrayRef padded, bool relu) {
  const auto images = check_accumulate_cams("accumulate_cams", maps, counts, sizes, padded);
  if (images.empty()) return {};
  const c10::cuda::CUDAGuard guard(maps[0].device());
  const std::vector<at::Tensor> out = empty_cams(images);
  accumulate_into(out, images, relu, false);
  return out;
}

void accumulate_cams_(at::TensorList out, at::TensorList maps, at::IntArrayRef counts, at::IntArrayRef padded,
                      bool relu) {
  const auto images = check_accumulate_cams("accumulate_cams", maps, counts, sizes_of(out), padded);
  check_cam_targets("accumulate_cams", out, images);
  check_apart("accumulate_cams", out, maps);
  if (images.empty()) return;
  const c10::cuda::CUDAGuard guard(maps[0].device());
  std::vector<at::Tensor> dense;
  for (const at::Tensor& target : out) dense.push_back(target.contiguous());
  accumulate_into(dense, images, relu, true);
  for (size_t i = 0; i < dense.size(); ++i) {
    if (!dense[i].is_same(out[i])) out[i].copy_(dense[i]);
  }
}

std::vector<at::Tensor> accumulate_cams_backward(at::TensorList grads, at::TensorList maps, at::IntArrayRef counts,
                                                 at::IntArrayRef padded, bool relu) {
  const auto images = check_accumulate_cams("accumulate_cams_backward", maps, counts, sizes_of(grads), padded);
  check_cam_targets("accumulate_cams_backward", grads, images);
  if (images.empty()) return {};
  const c10::cuda::CUDAGuard guard(maps[0].device());
  std::vector<at::Tensor> dense, results;  // dense: kept until the launches are queued
  std::vector<CamGradient> entries;
  for (size_t i = 0; i < images.size(); ++i) {
    dense.push_back(grads[i].contiguous());
    for (const at::Tensor& map : images[i].scales) {
      results.push_back(at::empty(map.sizes(), map.options()));
      if (map.numel() == 0) continue;
      entries.push_back({map.const_data_ptr(), dense.back().const_data_ptr(), results.back().data_ptr(),
                         view_stride(map), static_cast<int32_t>(map.size(1)), static_cast<int32_t>(map.size(2)),
                         static_cast<int32_t>(map.size(3)), static_cast<int32_t>(images[i].height),
                         static_cast<int32_t>(images[i].width), static_cast<int32_t>(images[i].padded_height),
                         static_cast<int32_t>(images[i].padded_width), 0});
    }
  }
  if (entries.empty()) return results;
  with_element(maps[0], [&](auto element) {
    using T = decltype(element);
    if (entries.size() <= kScales) {
      launch_backward<T, kScales>(entries, relu);
    } else {
      launch_backward<T, entries_per_launch<CamGradient>()>(entries, relu);
    }
  });
  return results;
}

}  // namespace
}  // namespace ribfast::cuda

TORCH_LIBRARY_IMPL(ribfast, CUDA, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("accumulate_cams", &ribfast::cuda::accumulate_cams);
  m.impl("accumulate_cams_", &ribfast::cuda::accumulate_cams_);
  m.impl("accumulate_cams_backward", &ribfast::cuda::accumulate_cams_backward);
}
