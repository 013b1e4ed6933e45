// refine on CUDA: kernels in refine.cuh, 1 + iterations launches for as many images as one launch describes and as fit
// the scratch. Any strides and dtypes (copied to dense float32); N = 0 or C = 0 launches nothing.
#include "refine.cuh"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "launch.h"

namespace ribfast::cuda {
namespace {

constexpr int64_t kScratch = int64_t{1} << 28;  // floats that the weights and spare maps of a launch's images may take
constexpr int kMany = entries_per_launch<RefineImage>(sizeof(RefineOptions) + 64);

int64_t pixels(const RefineImage& image) { return static_cast<int64_t>(image.height) * image.width; }

int64_t scratch(const RefineImage& image, int64_t neighbours) { return (neighbours + image.classes) * pixels(image); }

template <int kImages>
void launch(const RefineImage* images, int64_t count, const RefineOptions& options, int64_t iterations, float* memory) {
  RefineBatch<kImages> batch;
  batch.count = static_cast<int32_t>(count), batch.options = options;
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    RefineImage& image = batch.images[i];
    image = images[i];
    image.weights = memory, memory += options.dilation_count * kAround * pixels(image);
    image.spare = memory, memory += image.classes * pixels(image);
    blocks += refine_blocks(image);
  }
  checked_grid("refine", blocks);
  refine_images(OnStream{c10::cuda::getCurrentCUDAStream()}, batch, iterations);
}

std::vector<at::Tensor> refine(at::TensorList images, at::TensorList maps, bool pamr, at::IntArrayRef dilations,
                               int64_t iterations, double w1, double w2) {
  check_refine(images, maps, dilations, iterations, w1, w2);
  if (maps.empty()) return {};
  const c10::cuda::CUDAGuard guard(maps[0].device());
  RefineOptions options{};
  options.dilation_count = static_cast<int32_t>(dilations.size());
  for (size_t i = 0; i < dilations.size(); ++i) options.dilations[i] = static_cast<int32_t>(dilations[i]);
  options.w1 = static_cast<float>(w1), options.pamr = pamr;
  position_weights(dilations.data(), static_cast<int64_t>(dilations.size()), w1, w2, options.position);
  std::vector<at::Tensor> results, dense;  // dense: kept until the launches are queued
  std::vector<RefineImage> entries;
  for (size_t i = 0; i < maps.size(); ++i) {
    dense.push_back(maps[i].to(at::kFloat).contiguous());
    const at::Tensor map = dense.back();
    results.push_back(at::empty(map.sizes(), map.options()));
    if (iterations == 0) results[i].copy_(map);
    if (map.numel() == 0 || iterations == 0) continue;
    dense.push_back(images[i].to(at::kFloat).contiguous());
    const int64_t size = map.size(2) * map.size(3), classes = map.size(1);
    RIBFAST_CHECK_VALUE(classes < (int64_t{1} << 31), "refine", "fewer than 2^31 classes", classes);
    for (int64_t n = 0; n < map.size(0); ++n) {
      RefineImage entry{};
      entry.image = dense.back().const_data_ptr<float>() + n * kColours * size;
      entry.maps = map.const_data_ptr<float>() + n * classes * size;
      entry.result = results[i].mutable_data_ptr<float>() + n * classes * size;
      entry.classes = static_cast<int32_t>(classes);
      entry.height = static_cast<int32_t>(map.size(2)), entry.width = static_cast<int32_t>(map.size(3));
      entries.push_back(entry);
    }
  }
  const int64_t neighbours = options.dilation_count * kAround;
  at::Tensor memory;  // of the first images; later ones take it over, in the stream's order
  for (size_t first = 0, end; first < entries.size(); first = end) {
    int64_t floats = scratch(entries[first], neighbours);
    for (end = first + 1; end < entries.size() && end - first < kMany; ++end) {
      const int64_t more = scratch(entries[end], neighbours);
      if (floats + more > kScratch) break;
      floats += more;
    }
    if (!memory.defined() || memory.numel() < floats) memory = at::empty({floats}, results[0].options());
    const auto count = static_cast<int64_t>(end - first);
    float* at = memory.mutable_data_ptr<float>();
    if (count == 1) {
      launch<1>(&entries[first], count, options, iterations, at);
    } else {
      launch<kMany>(&entries[first], count, options, iterations, at);
    }
  }
  return results;
}

}  // namespace
}  // namespace ribfast::cuda

TORCH_LIBRARY_IMPL(ribfast, CUDA, m) { m.impl("refine", &ribfast::cuda::refine); }
