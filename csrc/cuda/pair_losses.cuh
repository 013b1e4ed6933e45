// What IRN's loss is made of: sums over the pairs of pixels closer than a radius, by their labels, and their gradients
// (added in no fixed order).
//
// Layout: boundary (count, height, width), displacement (count, 2, height, width), y before x, float32; labels (count,
// height, width) uint8, 255 unknown; contiguous. Pairs begin where all of a pixel's neighbours are inside: `rows` rows
// from the top, `columns` columns behind the first radius - 1; tiles cover these. Gradients are added to.
#pragma once

#include "pairs.cuh"

namespace ribfast::cuda {

constexpr int kLossSums = 8;
constexpr float kLossEpsilon = 1e-5f;

struct PairMaps {
  const float *boundary, *displacement;
  const uint8_t* labels;
  int32_t height, width, rows, columns, tiles_y, tiles_x;
  int radius;
};

// A tile of everything that the sums depend on.
struct PairTileMaps {
  PathTable table;
  float boundary[kPairCells], displacement_y[kPairCells], displacement_x[kPairCells];
  uint8_t labels[kPairCells];

  __device__ void load(const PairMaps& maps, const PairTile& tile) {
    const int64_t n = static_cast<int64_t>(maps.height) * maps.width;
    const int reach = maps.radius - 1;
    const float* displacement = maps.displacement + 2 * tile.image * n;
    table.fill(maps.radius);
    load_tile(maps.boundary + tile.image * n, maps.height, maps.width, tile, reach, 1.0f, AsBoundary(), boundary);
    load_tile(displacement, maps.height, maps.width, tile, reach, 0.0f, AsIs(), displacement_y);
    load_tile(displacement + n, maps.height, maps.width, tile, reach, 0.0f, AsIs(), displacement_x);
    load_tile(maps.labels + tile.image * n, maps.height, maps.width, tile, reach, uint8_t{255}, AsIs(), labels);
    __syncthreads();
  }
};

enum PairKind { kBackground, kForeground, kOther, kUnknown };

__device__ __forceinline__ PairKind kind_of(uint8_t here, uint8_t there) {
  if (here == 255 || there == 255) return kUnknown;
  if (here != there) return kOther;
  return here == 0 ? kBackground : kForeground;
}

// The tile's first pixel is that many columns behind the first where pairs begin.
__device__ __forceinline__ PairTile loss_tile(const PairMaps& maps) {
  PairTile tile(blockIdx.x, maps.tiles_y, maps.tiles_x);
  tile.left += maps.radius - 1;
  return tile;
}

// partial: kLossSums of each block
__global__ void __launch_bounds__(kPairThreads) pair_losses_kernel(PairMaps maps, float* partial) {
  __shared__ PairTileMaps shared;
  __shared__ float scratch[kWarp];
  const PairTile tile = loss_tile(maps);
  const int reach = maps.radius - 1;
  shared.load(maps, tile);
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t row = thread / kPairWidth, column = thread % kPairWidth;
  const int own = row * kPairStride + column + reach;
  float sums[kLossSums] = {};
  if (tile.top + row < maps.rows && tile.left - reach + column < maps.columns && shared.labels[own] != 255) {
    for (int pair = 0; pair < shared.table.count; ++pair) {
      const int y = shared.table.y[pair], x = shared.table.x[pair], other = own + y * kPairStride + x;
      const PairKind kind = kind_of(shared.labels[own], shared.labels[other]);
      if (kind == kUnknown) continue;
      const float a = affinity_of(path_maximum(shared.table, pair, shared.boundary, own).value);
      const float loss = -logf(kind == kOther ? (1 + kLossEpsilon) - a : a + kLossEpsilon);
      const float move_y = shared.displacement_y[own] - shared.displacement_y[other];
      const float move_x = shared.displacement_x[own] - shared.displacement_x[other];
      if (kind == kBackground) {
        sums[0] += loss, sums[5] += 1;
        sums[4] += fabsf(move_y) + fabsf(move_x);
      } else if (kind == kForeground) {
        sums[1] += loss, sums[6] += 1;
        sums[3] += fabsf(move_y - static_cast<float>(y)) + fabsf(move_x - static_cast<float>(x));
      } else {
        sums[2] += loss, sums[7] += 1;
      }
    }
  }
  for (int k = 0; k < kLossSums; ++k) {
    const float total = block_reduce(sums[k], Plus(), scratch);
    if (threadIdx.x == 0) partial[static_cast<int64_t>(blockIdx.x) * kLossSums + k] = total;
    __syncthreads();
  }
}

__device__ __forceinline__ float sign_of(float x) { return static_cast<float>(x > 0) - static_cast<float>(x < 0); }

__global__ void __launch_bounds__(kPairThreads)
    pair_losses_backward_kernel(PairMaps maps, const float* grads, float* to_boundary, float* to_displacement) {
  __shared__ PairTileMaps shared;
  __shared__ float sums[kPairCells];
  const PairTile tile = loss_tile(maps);
  const int reach = maps.radius - 1;
  const int64_t n = static_cast<int64_t>(maps.height) * maps.width;
  shared.load(maps, tile);
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t row = thread / kPairWidth, column = thread % kPairWidth;
  const int own = row * kPairStride + column + reach;
  const bool inside = tile.top + row < maps.rows && tile.left - reach + column < maps.columns;
  const bool begins = inside && shared.labels[own] != 255;
  // one plane after another through the same memory: the boundary's, y's, x's
  for (int plane = 0; plane < 3; ++plane) {
    for (int i = static_cast<int>(threadIdx.x); i < kPairCells; i += kPairThreads) sums[i] = 0;
    __syncthreads();
    float own_sum = 0;
    const float* displacement = plane == 1 ? shared.displacement_y : shared.displacement_x;
    for (int pair = 0; begins && pair < shared.table.count; ++pair) {
      const int y = shared.table.y[pair], x = shared.table.x[pair], other = own + y * kPairStride + x;
      const PairKind kind = kind_of(shared.labels[own], shared.labels[other]);
      if (kind == kUnknown) continue;
      if (plane == 0) {
        const PathMaximum top = path_maximum(shared.table, pair, shared.boundary, own);
        if (top.value > 1 && top.value < INFINITY) continue;  // clamped
        const float a = affinity_of(top.value);
        const float slope = kind == kOther ? -grads[2] / ((1 + kLossEpsilon) - a) : grads[kind] / (a + kLossEpsilon);
        if (slope != 0) atomicAdd(sums + top.cell, slope);
      } else if (kind != kOther) {
        const float move = displacement[own] - displacement[other];
        const float wanted = static_cast<float>(kind == kBackground ? 0 : plane == 1 ? y : x);
        const float slope = sign_of(move - wanted) * grads[kind == kBackground ? 4 : 3];
        own_sum += slope;
        if (slope != 0) atomicAdd(sums + other, -slope);
      }
    }
    if (own_sum != 0) atomicAdd(sums + own, own_sum);
    __syncthreads();
    float* to = plane == 0 ? to_boundary + tile.image * n : to_displacement + (2 * tile.image + plane - 1) * n;
    add_tile(sums, maps.height, maps.width, tile, reach, to);
    __syncthreads();
  }
}

}  // namespace ribfast::cuda
