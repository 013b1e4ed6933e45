// Local refinement of class maps: m(u) <- sum over neighbours k of weight_k(u) m(u + k), weights from an image: PAR's
// and PAMR's formulas stand in cpu/refine.inl, as does why exponents are taken as they are.
//
// Layout: image (3, H, W), maps, spare and result (classes, H, W), weights (neighbours, H, W), all contiguous float32.
// A thread a pixel, a block a tile of 32 x 8 of them. Images of any sizes and numbers of classes share a launch; their
// descriptions travel by value as the kernel's argument. classes >= 1, iterations >= 1. Sums run in a fixed order.
#pragma once

#include "../refine.h"
#include "common.cuh"

namespace ribfast::cuda {

constexpr int kRefineRows = 8, kRefineThreads = kWarp * kRefineRows, kColours = 3;

struct RefineImage {
  const float *image, *maps;
  float *weights, *spare, *result;  // spare: unused in a single iteration
  int32_t classes, height, width;
  uint32_t first_block;
};

struct RefineOptions {
  int32_t dilations[kMostDilations];
  float position[kMostNeighbours];  // PAR's
  int32_t dilation_count;
  float w1;
  bool pamr;
};

template <int kImages>
struct RefineBatch {
  RefineImage images[kImages];
  RefineOptions options;
  int32_t count;
};

inline int64_t refine_blocks(const RefineImage& image) {
  return ((image.height + kRefineRows - 1) / kRefineRows) * int64_t{(image.width + kWarp - 1) / kWarp};
}

// The pixel of this thread; false where it has none.
__device__ __forceinline__ bool find_pixel(const RefineImage& image, int32_t& y, int32_t& x) {
  const uint32_t tile = blockIdx.x - image.first_block;
  const int32_t across = (image.width + kWarp - 1) / kWarp;
  y = static_cast<int32_t>(tile / across) * kRefineRows + static_cast<int32_t>(threadIdx.x) / kWarp;
  x = static_cast<int32_t>(tile % across) * kWarp + static_cast<int32_t>(threadIdx.x) % kWarp;
  return y < image.height && x < image.width;
}

// Calls f(k, offset in a plane) for every neighbour k.
template <typename F>
__device__ __forceinline__ void each_neighbour(const RefineImage& image, const RefineOptions& options, int32_t y,
                                               int32_t x, F&& f) {
  for (int32_t i = 0; i < options.dilation_count; ++i) {
    const int32_t d = options.dilations[i];
    const int64_t rows[3] = {static_cast<int64_t>(max(y - d, 0)) * image.width, static_cast<int64_t>(y) * image.width,
                             static_cast<int64_t>(min(y + d, image.height - 1)) * image.width};
    const int32_t columns[3] = {max(x - d, 0), x, min(x + d, image.width - 1)};
#pragma unroll
    for (int j = 0; j < kAround; ++j) {
      const int place = j < kAround / 2 ? j : j + 1;  // in the 3 x 3 around, the centre left out
      f(i * kAround + j, rows[place / 3] + columns[place % 3]);
    }
  }
}

template <int kImages>
__global__ void __launch_bounds__(kRefineThreads)
    affinities_kernel(const __grid_constant__ RefineBatch<kImages> batch) {
  const RefineImage& image = batch.images[entry_of_block(batch.images, batch.count, blockIdx.x)];
  const RefineOptions& options = batch.options;
  int32_t y, x;
  if (!find_pixel(image, y, x)) return;
  const int64_t size = static_cast<int64_t>(image.height) * image.width;
  const int64_t pixel = static_cast<int64_t>(y) * image.width + x;
  const auto neighbours = static_cast<float>(options.dilation_count * kAround);
  const float centres = options.pamr ? static_cast<float>(options.dilation_count) : 0.0f;
  float centre[kColours], mean[kColours] = {}, squares[kColours] = {}, scale[kColours], shift[kColours];
#pragma unroll
  for (int c = 0; c < kColours; ++c) centre[c] = __ldg(image.image + c * size + pixel);
  each_neighbour(image, options, y, x, [&](int, int64_t at) {
#pragma unroll
    for (int c = 0; c < kColours; ++c) mean[c] += __ldg(image.image + c * size + at) - centre[c];
  });
#pragma unroll
  for (int c = 0; c < kColours; ++c) mean[c] /= neighbours + centres;
  each_neighbour(image, options, y, x, [&](int, int64_t at) {
#pragma unroll
    for (int c = 0; c < kColours; ++c) {
      const float v = __ldg(image.image + c * size + at) - centre[c] - mean[c];
      squares[c] += v * v;
    }
  });
#pragma unroll
  for (int c = 0; c < kColours; ++c) {
    const float deviation = sqrtf((squares[c] + centres * mean[c] * mean[c]) / (neighbours + centres - 1));
    if (options.pamr) {
      scale[c] = 1 / (1e-8f + 0.1f * deviation) / kColours;
    } else {
      const float inverse = 1 / ((deviation + 1e-8f) * options.w1);
      scale[c] = inverse * inverse / kColours;
      shift[c] = 2 * mean[c] * scale[c];
    }
  }
  const auto exponent = [&](int64_t at) {
    float e = 0;
#pragma unroll
    for (int c = 0; c < kColours; ++c) {
      const float d = __ldg(image.image + c * size + at) - centre[c], v = d - mean[c];
      e -= options.pamr ? fabsf(d) * scale[c] : (v * scale[c] + shift[c]) * v;
    }
    return e;
  };
  float top = -INFINITY, sum = 0;
  each_neighbour(image, options, y, x, [&](int, int64_t at) {
    const float e = exponent(at);
    if (e > top) {
      sum = sum * expf(top - e) + 1;
      top = e;
    } else {
      sum += expf(e - top);
    }
  });
  each_neighbour(image, options, y, x, [&](int k, int64_t at) {
    const float weight = expf(exponent(at) - top) / sum;
    image.weights[k * size + pixel] = options.pamr ? weight : weight + options.position[k];
  });
}

// One iteration, kClasses of an image's classes at once: weights come from memory for the first of them, from the
// caches for the others. first: from the maps given; to_result: else to the spare ones.
template <int kClasses, int kImages>
__global__ void __launch_bounds__(kRefineThreads)
    refine_kernel(const __grid_constant__ RefineBatch<kImages> batch, bool first, bool to_result) {
  const RefineImage& image = batch.images[entry_of_block(batch.images, batch.count, blockIdx.x)];
  int32_t y, x;
  if (!find_pixel(image, y, x)) return;
  const int64_t size = static_cast<int64_t>(image.height) * image.width;
  const int64_t pixel = static_cast<int64_t>(y) * image.width + x;
  const float* in = first ? image.maps : to_result ? image.spare : image.result;
  float* out = to_result ? image.result : image.spare;
  for (int32_t begin = 0; begin < image.classes; begin += kClasses) {
    const int32_t last = min(kClasses, image.classes - begin) - 1;
    const float* from[kClasses];
    float sum[kClasses];
#pragma unroll
    for (int c = 0; c < kClasses; ++c) from[c] = in + min(begin + c, begin + last) * size, sum[c] = 0;
    each_neighbour(image, batch.options, y, x, [&](int k, int64_t at) {
      const float weight = __ldg(image.weights + k * size + pixel);
#pragma unroll
      for (int c = 0; c < kClasses; ++c) sum[c] += weight * __ldg(from[c] + at);
    });
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      if (c <= last) out[(begin + c) * size + pixel] = sum[c];
    }
  }
}

// All of it for a batch whose images are described but for their blocks.
template <int kImages, typename Run>
void refine_images(const Run& run, RefineBatch<kImages>& batch, int64_t iterations) {
  int64_t blocks = 0;
  int32_t classes = 1;
  for (int i = 0; i < batch.count; ++i) {
    batch.images[i].first_block = static_cast<uint32_t>(blocks);
    blocks += refine_blocks(batch.images[i]);
    classes = batch.images[i].classes > classes ? batch.images[i].classes : classes;
  }
  const dim3 grid(static_cast<unsigned>(blocks));
  run(affinities_kernel<kImages>, grid, kRefineThreads, batch);
  for (int64_t i = 0; i < iterations; ++i) {
    const bool first = i == 0, to_result = (iterations - i) % 2 == 1;
    if (classes > 4) {
      run(refine_kernel<8, kImages>, grid, kRefineThreads, batch, first, to_result);
    } else if (classes > 2) {
      run(refine_kernel<4, kImages>, grid, kRefineThreads, batch, first, to_result);
    } else if (classes > 1) {
      run(refine_kernel<2, kImages>, grid, kRefineThreads, batch, first, to_result);
    } else {
      run(refine_kernel<1, kImages>, grid, kRefineThreads, batch, first, to_result);
    }
  }
}

}  // namespace ribfast::cuda
