// cams T^steps for T = W / its columns' sums, W the symmetric weights of pairs of pixels closer than a radius with 1 on
// the diagonal: one launch a step, or a term of its Chebyshev series, for all images.
//
// Layout: cams, results and buffers (classes, height, width) float32, weights (pairs, height, width) float32, all
// contiguous; up to kWalkClasses classes an entry, images of any sizes. A weight of a pair that leaves the map is not
// read. Entries travel by value, so that the launches can be captured.
#pragma once

#include "common.cuh"

namespace ribfast::cuda {

constexpr int kWalkClasses = 4;
constexpr int kWalkWidth = kWarp, kWalkHeight = 8, kWalkPixels = kWalkWidth * kWalkHeight;

struct WalkEntry {
  const float *cams, *weights;
  float *even, *odd;  // T_k cams of even and odd k
  float* result;  // the series' sum, or null
  float* inverse;  // of the columns' sums
  int32_t classes, height, width;
  uint32_t first_block;
};

template <int kEntries>
struct WalkBatch {
  WalkEntry entries[kEntries];
  int32_t count, radius;
};

inline int64_t walk_blocks(int64_t height, int64_t width) {
  return ((height + kWalkHeight - 1) / kWalkHeight) * ((width + kWalkWidth - 1) / kWalkWidth);
}

struct WalkPixel {
  int32_t top, left, y, x;

  __device__ WalkPixel(const WalkEntry& entry) {
    const int32_t tiles_x = (entry.width + kWalkWidth - 1) / kWalkWidth;
    const auto tile = static_cast<int32_t>(blockIdx.x - entry.first_block);
    top = tile / tiles_x * kWalkHeight, left = tile % tiles_x * kWalkWidth;
    y = top + static_cast<int32_t>(threadIdx.x) / kWalkWidth, x = left + static_cast<int32_t>(threadIdx.x) % kWalkWidth;
  }
};

// Calls f(y, x, forth, back) with every pair that begins, and every one that ends at a pixel `at`: their weights, or 0.
template <typename F>
__device__ __forceinline__ void for_pairs(const WalkEntry& entry, int radius, const WalkPixel& pixel, F&& f) {
  const int64_t n = static_cast<int64_t>(entry.height) * entry.width;
  const float* weights = entry.weights + static_cast<int64_t>(pixel.y) * entry.width + pixel.x;
  for (int y = 0; y < radius; ++y) {
    const int widest = widest_column(y, radius);
    for (int x = y ? -widest : 1; x <= widest; ++x, weights += n) {
      const int32_t right = pixel.x + x, left = pixel.x - x;
      const bool forth = pixel.y + y < entry.height && right >= 0 && right < entry.width;
      const bool back = pixel.y - y >= 0 && left >= 0 && left < entry.width;
      f(y, x, forth ? weights[0] : 0.0f, back ? weights[-(static_cast<int64_t>(y) * entry.width + x)] : 0.0f);
    }
  }
}

// Begins each entry: T_0 = cams, the sum of its series, and the columns' sums.
template <int kEntries>
__global__ void __launch_bounds__(kWalkPixels)
    walk_begin_kernel(const __grid_constant__ WalkBatch<kEntries> batch, float factor) {
  const WalkEntry& entry = batch.entries[entry_of_block(batch.entries, batch.count, blockIdx.x)];
  const WalkPixel pixel(entry);
  if (pixel.y >= entry.height || pixel.x >= entry.width) return;
  const int64_t n = static_cast<int64_t>(entry.height) * entry.width;
  const int64_t at = static_cast<int64_t>(pixel.y) * entry.width + pixel.x;
  float sum = 1;
  for_pairs(entry, batch.radius, pixel, [&](int, int, float forth, float back) { sum += forth + back; });
  entry.inverse[at] = 1 / sum;
  for (int c = 0; c < entry.classes; ++c) {
    const float value = entry.cams[c * n + at];
    entry.even[c * n + at] = value;
    if (entry.result) entry.result[c * n + at] = factor * value;
  }
}

// next = T current, or (twice) 2 T current - next; result += factor next. Sums are of differences: where a map is even,
// hundreds of steps leave it so to the last bit.
template <int kReach, int kClasses, int kEntries>
__global__ void __launch_bounds__(kWalkPixels)
    walk_step_kernel(const __grid_constant__ WalkBatch<kEntries> batch, bool from_even, bool twice, float factor) {
  constexpr int kColumns = kWalkWidth + 2 * kReach, kRows = kWalkHeight + 2 * kReach;
  __shared__ float tile[kClasses][kRows * kColumns];
  const WalkEntry& entry = batch.entries[entry_of_block(batch.entries, batch.count, blockIdx.x)];
  const WalkPixel pixel(entry);
  const int64_t n = static_cast<int64_t>(entry.height) * entry.width;
  const float* current = from_even ? entry.even : entry.odd;
  float* next = from_even ? entry.odd : entry.even;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns; i += kWalkPixels) {
    const int32_t y = pixel.top - kReach + i / kColumns, x = pixel.left - kReach + i % kColumns;
    const bool inside = y >= 0 && y < entry.height && x >= 0 && x < entry.width;
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      tile[c][i] = inside && c < entry.classes ? current[c * n + static_cast<int64_t>(y) * entry.width + x] : 0.0f;
    }
  }
  __syncthreads();
  if (pixel.y >= entry.height || pixel.x >= entry.width) return;
  const int own = (pixel.y - pixel.top + kReach) * kColumns + pixel.x - pixel.left + kReach;
  float values[kClasses], sums[kClasses];
#pragma unroll
  for (int c = 0; c < kClasses; ++c) values[c] = tile[c][own], sums[c] = 0;
  for_pairs(entry, batch.radius, pixel, [&](int y, int x, float forth, float back) {
    const int distance = y * kColumns + x;
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      sums[c] += forth * (tile[c][own + distance] - values[c]);
      sums[c] += back * (tile[c][own - distance] - values[c]);
    }
  });
  const int64_t at = static_cast<int64_t>(pixel.y) * entry.width + pixel.x;
  const float inverse = entry.inverse[at];
#pragma unroll
  for (int c = 0; c < kClasses; ++c) {
    if (c >= entry.classes) break;
    float value = values[c] + sums[c] * inverse;
    if (twice) value = 2 * value - next[c * n + at];
    next[c * n + at] = value;
    if (factor != 0) entry.result[c * n + at] += factor * value;
  }
}

}  // namespace ribfast::cuda
