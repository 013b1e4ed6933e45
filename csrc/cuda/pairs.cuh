// Pairs of pixels closer than a radius and the paths between them: what path_affinity and pair_losses share.
//
// A block has a tile of kPairWidth x kPairHeight pixels, one thread each, and all that their pairs reach in shared
// memory: radius - 1 columns at both sides and as many rows below. Every thread walks the same pairs at the same time.
#pragma once

#include "common.cuh"

namespace ribfast::cuda {

constexpr int kPairWidth = kWarp, kPairHeight = 8, kPairThreads = kPairWidth * kPairHeight;
constexpr int kMostReach = kLargestRadius - 1;
constexpr int kPairStride = kPairWidth + 2 * kMostReach, kPairRows = kPairHeight + kMostReach;
constexpr int kPairCells = kPairStride * kPairRows;
constexpr int kMostPairs = 396, kMostPathRows = 3074;  // of the largest radius

// The pairs in order, and of each row of a pair's path its first and last column.
struct PathTable {
  int16_t begin[kMostPairs];  // of a pair, in first and last
  int8_t y[kMostPairs], x[kMostPairs], first[kMostPathRows], last[kMostPathRows];
  int count;

  // By all threads of the block; a __syncthreads() behind it.
  __device__ void fill(int radius) {
    if (static_cast<int>(threadIdx.x) < radius) {
      const int own = static_cast<int>(threadIdx.x);
      int pair = 0, row = 0;
      for (int before = 0; before < own; ++before) {
        const int pairs = before ? 2 * widest_column(before, radius) + 1 : radius - 1;
        pair += pairs, row += pairs * (before + 1);
      }
      const int widest = widest_column(own, radius);
      for (int column = own ? -widest : 1; column <= widest; ++column, ++pair, row += own + 1) {
        begin[pair] = static_cast<int16_t>(row);
        y[pair] = static_cast<int8_t>(own), x[pair] = static_cast<int8_t>(column);
      }
      if (own == radius - 1) count = pair;
    }
    __syncthreads();
    for (int pair = static_cast<int>(threadIdx.x); pair < count; pair += static_cast<int>(blockDim.x)) {
      for (int row = 0; row <= y[pair]; ++row) {
        const PathColumns columns = path_columns(y[pair], x[pair], row);
        first[begin[pair] + row] = static_cast<int8_t>(columns.first);
        last[begin[pair] + row] = static_cast<int8_t>(columns.last);
      }
    }
  }
};

// Where a block's tile lies.
struct PairTile {
  int64_t image;
  int32_t top, left;  // its first pixel

  __device__ PairTile(int64_t block, int32_t tiles_y, int32_t tiles_x) {
    image = block / (static_cast<int64_t>(tiles_y) * tiles_x);
    const auto rest = static_cast<int32_t>(block - image * tiles_y * tiles_x);
    top = rest / tiles_x * kPairHeight, left = rest % tiles_x * kPairWidth;
  }
};

inline int64_t pair_tiles(int64_t rows, int64_t columns) {
  return ((rows + kPairHeight - 1) / kPairHeight) * ((columns + kPairWidth - 1) / kPairWidth);
}

// A plane's tile and its surroundings into shared memory, through `as`; `outside` beyond the plane.
template <typename From, typename To, typename As>
__device__ void load_tile(const From* plane, int32_t height, int32_t width, const PairTile& tile, int reach, To outside,
                          As as, To* shared) {
  const int columns = kPairWidth + 2 * reach, cells = columns * (kPairHeight + reach);
  for (int i = static_cast<int>(threadIdx.x); i < cells; i += kPairThreads) {
    const int row = i / columns, column = i - row * columns;
    const int32_t y = tile.top + row, x = tile.left + column - reach;
    const bool inside = y < height && x >= 0 && x < width;
    shared[row * kPairStride + column] = inside ? as(plane[static_cast<int64_t>(y) * width + x]) : outside;
  }
}

// A NaN as infinity, which path maxima keep.
struct AsBoundary {
  __device__ float operator()(float x) const { return x != x ? INFINITY : x; }
};

struct AsIs {
  template <typename T>
  __device__ T operator()(T x) const {
    return x;
  }
};

// The largest boundary on a pair's path, and the cell of the first of equals.
struct PathMaximum {
  float value;
  int cell;
};

__device__ __forceinline__ PathMaximum path_maximum(const PathTable& table, int pair, const float* boundary, int own) {
  PathMaximum top{-INFINITY, own};
  const int rows = table.y[pair] + 1, begin = table.begin[pair];
  for (int row = 0; row < rows; ++row) {
    const int end = own + row * kPairStride + table.last[begin + row];
    for (int cell = own + row * kPairStride + table.first[begin + row]; cell <= end; ++cell) {
      if (boundary[cell] > top.value) top = {boundary[cell], cell};
    }
  }
  return top;
}

__device__ __forceinline__ float affinity_of(float top) {
  if (!(top < INFINITY)) return NAN;
  return top < 1 ? 1 - top : 0.0f;
}

// A tile of gradients, with its surroundings, added to their plane.
__device__ inline void add_tile(const float* shared, int32_t height, int32_t width, const PairTile& tile, int reach,
                                float* plane) {
  const int columns = kPairWidth + 2 * reach, cells = columns * (kPairHeight + reach);
  for (int i = static_cast<int>(threadIdx.x); i < cells; i += kPairThreads) {
    const int row = i / columns, column = i - row * columns;
    const int32_t y = tile.top + row, x = tile.left + column - reach;
    const float value = shared[row * kPairStride + column];
    if (y < height && x >= 0 && x < width && value != 0) atomicAdd(plane + static_cast<int64_t>(y) * width + x, value);
  }
}

}  // namespace ribfast::cuda
