// A(i, j) = (1 - the largest boundary on the path from i to j) ** beta of all pairs closer than a radius, and its
// gradient, which goes to the path's first largest pixel (added in no fixed order).
//
// Layout: boundary (count, height, width) and affinities (count, pairs, height, width) float32, contiguous; the
// boundary's gradient is added to. count, height, width >= 1.
#pragma once

#include "pairs.cuh"

namespace ribfast::cuda {

__global__ void __launch_bounds__(kPairThreads)
    path_affinity_kernel(const float* boundary, int32_t height, int32_t width, int32_t tiles_y, int32_t tiles_x,
                         int radius, float beta, float* out) {
  __shared__ PathTable table;
  __shared__ float tile_boundary[kPairCells];
  const PairTile tile(blockIdx.x, tiles_y, tiles_x);
  const int64_t n = static_cast<int64_t>(height) * width;
  const int reach = radius - 1;
  table.fill(radius);
  load_tile(boundary + tile.image * n, height, width, tile, reach, 1.0f, AsBoundary(), tile_boundary);
  __syncthreads();
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t row = thread / kPairWidth, column = thread % kPairWidth;
  const int32_t y = tile.top + row, x = tile.left + column;
  if (y >= height || x >= width) return;
  const int own = row * kPairStride + column + reach;
  float* at = out + tile.image * table.count * n + static_cast<int64_t>(y) * width + x;
  for (int pair = 0; pair < table.count; ++pair, at += n) {
    const float a = affinity_of(path_maximum(table, pair, tile_boundary, own).value);
    *at = beta == 1 ? a : powf(a, beta);
  }
}

__global__ void __launch_bounds__(kPairThreads)
    path_affinity_backward_kernel(const float* grad, const float* boundary, int32_t height, int32_t width,
                                  int32_t tiles_y, int32_t tiles_x, int radius, float beta, float* result) {
  __shared__ PathTable table;
  __shared__ float tile_boundary[kPairCells], sums[kPairCells];
  const PairTile tile(blockIdx.x, tiles_y, tiles_x);
  const int64_t n = static_cast<int64_t>(height) * width;
  const int reach = radius - 1;
  table.fill(radius);
  load_tile(boundary + tile.image * n, height, width, tile, reach, 1.0f, AsBoundary(), tile_boundary);
  for (int i = static_cast<int>(threadIdx.x); i < kPairCells; i += kPairThreads) sums[i] = 0;
  __syncthreads();
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t row = thread / kPairWidth, column = thread % kPairWidth;
  const int32_t y = tile.top + row, x = tile.left + column;
  if (y < height && x < width) {
    const int own = row * kPairStride + column + reach;
    const float* at = grad + tile.image * table.count * n + static_cast<int64_t>(y) * width + x;
    for (int pair = 0; pair < table.count; ++pair, at += n) {
      const PathMaximum top = path_maximum(table, pair, tile_boundary, own);
      if (top.value > 1 && top.value < INFINITY) continue;  // clamped
      const float a = affinity_of(top.value);
      const float slope = -beta * *at * (beta == 1 ? (a != a ? a : 1.0f) : powf(a, beta - 1));
      if (slope != 0) atomicAdd(sums + top.cell, slope);
    }
  }
  __syncthreads();
  add_tile(sums, height, width, tile, reach, result + tile.image * n);
}

}  // namespace ribfast::cuda
