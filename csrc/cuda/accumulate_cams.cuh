// out(c, y, x) = sum over scales of bilinear(A_s)(c, y, x), A_s = ReLU(T_s) + mirrored ReLU(T'_s), and its transpose.
//
// Layout: maps (V, C, h, w) contiguous, V = 1 or 2 (view_stride 0 or C h w); out and grads (C, H, W) contiguous in
// accumulators. Images of any sizes share a launch; their descriptions travel by value as the kernel's argument, so
// that nothing is copied from the host and a launch can be captured. At most kScales scales an image and launch.
#pragma once

#include "common.cuh"

namespace ribfast::cuda {

constexpr int kScales = 4;  // two rows of each are held in registers

struct CamScale {
  const void* map;
  int64_t view_stride;
  int32_t height, width;
};

struct CamImage {
  CamScale scales[kScales];
  void* out;
  int32_t count, channels, height, width, padded_height, padded_width;
  uint32_t first_block;
};

template <int kImages>
struct CamBatch {
  CamImage images[kImages];
  int32_t count;
  bool relu, add;
};

// A_s at one cell.
template <typename T>
__device__ __forceinline__ Acc<T> merged(const T* map, const CamScale& scale, int32_t row, int32_t column, bool relu) {
  using S = Acc<T>;
  const T* at = map + static_cast<int64_t>(row) * scale.width;
  S value = widen(at[column]);
  value = relu && value < 0 ? S(0) : value;  // NaN stays
  if (scale.view_stride) {
    S other = widen(at[scale.view_stride + scale.width - 1 - column]);
    other = relu && other < 0 ? S(0) : other;
    value += other;
  }
  return value;
}

// A warp sweeps kRows rows down kColumns columns; lane l owns columns l, l + 32, ... so that stores coalesce at any
// width. It keeps the two stretched rows of each scale that it is between and replaces them when it crosses a cell.
constexpr int kSweepColumns = 4, kSweepRows = 16, kSweepWarps = 8;
constexpr int kTileWidth = kSweepColumns * kWarp, kTileHeight = kSweepRows * kSweepWarps;

inline int64_t accumulate_blocks(const CamImage& image) {
  return static_cast<int64_t>(image.channels) * ((image.height + kTileHeight - 1) / kTileHeight) *
         ((image.width + kTileWidth - 1) / kTileWidth);
}

template <typename T, int kImages>
__global__ void __launch_bounds__(kWarp* kSweepWarps)
    accumulate_kernel(const __grid_constant__ CamBatch<kImages> batch) {
  using S = Acc<T>;
  const CamImage& image = batch.images[entry_of_block(batch.images, batch.count, blockIdx.x)];
  const int32_t tiles_x = (image.width + kTileWidth - 1) / kTileWidth;
  const int32_t tiles_y = (image.height + kTileHeight - 1) / kTileHeight;
  uint32_t tile = blockIdx.x - image.first_block;
  const int32_t tile_x = tile % tiles_x;
  tile /= tiles_x;
  const int32_t tile_y = tile % tiles_y, channel = tile / tiles_y;
  const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int32_t row_begin = tile_y * kTileHeight + warp * kSweepRows;
  const int32_t row_end = min(row_begin + kSweepRows, image.height);
  const int32_t column = tile_x * kTileWidth + lane;

  S low[kScales][kSweepColumns], high[kScales][kSweepColumns], step_y[kScales];
  int32_t low_cell[kScales];
#pragma unroll
  for (int s = 0; s < kScales; ++s) {
    low_cell[s] = -2;
    step_y[s] = s < image.count ? static_cast<S>(image.scales[s].height) / static_cast<S>(image.padded_height) : S(0);
#pragma unroll
    for (int k = 0; k < kSweepColumns; ++k) low[s][k] = high[s][k] = 0;
  }
  S* out = static_cast<S*>(image.out) + (static_cast<int64_t>(channel) * image.height + row_begin) * image.width;
  for (int32_t y = row_begin; y < row_end; ++y, out += image.width) {
    S sum[kSweepColumns];
#pragma unroll
    for (int k = 0; k < kSweepColumns; ++k) sum[k] = 0;
#pragma unroll
    for (int s = 0; s < kScales; ++s) {
      if (s < image.count) {
        const CamScale& scale = image.scales[s];
        const Tap<S> tap = bilinear_tap<S>(y, step_y[s], scale.height);
        if (tap.cell != low_cell[s]) {
          const bool advance = tap.cell == low_cell[s] + 1;
          const T* map = static_cast<const T*>(scale.map) +
                         static_cast<int64_t>(channel) * scale.height * scale.width;
          const S step_x = static_cast<S>(scale.width) / static_cast<S>(image.padded_width);
          const int32_t next = min(tap.cell + 1, scale.height - 1);
#pragma unroll
          for (int k = 0; k < kSweepColumns; ++k) {
            const int32_t x = min(column + k * kWarp, image.width - 1);
            const Tap<S> across = bilinear_tap<S>(x, step_x, scale.width);
            const int32_t right = min(across.cell + 1, scale.width - 1);
            const auto stretched = [&](int32_t row) {
              return (1 - across.t) * merged(map, scale, row, across.cell, batch.relu) +
                     across.t * merged(map, scale, row, right, batch.relu);
            };
            low[s][k] = advance ? high[s][k] : stretched(tap.cell);
            high[s][k] = stretched(next);
          }
          low_cell[s] = tap.cell;
        }
#pragma unroll
        for (int k = 0; k < kSweepColumns; ++k) sum[k] += (1 - tap.t) * low[s][k] + tap.t * high[s][k];
      }
    }
#pragma unroll
    for (int k = 0; k < kSweepColumns; ++k) {
      const int32_t x = column + k * kWarp;
      if (x < image.width) out[x] = batch.add ? out[x] + sum[k] : sum[k];
    }
  }
}

// One scale of one image, for the transpose.
struct CamGradient {
  const void *map, *grads;
  void* result;
  int64_t view_stride;
  int32_t channels, height, width;          // of the map
  int32_t rows, columns;                    // of the grads
  int32_t padded_height, padded_width;
  uint32_t first_block;
};

template <int kEntries>
struct CamGradients {
  CamGradient entries[kEntries];
  int32_t count;
  bool relu;
};

constexpr int kGatherWarps = 8;

inline int64_t accumulate_backward_blocks(const CamGradient& entry) {
  const int64_t cells = static_cast<int64_t>(entry.channels) * entry.height * entry.width;
  return (cells + kGatherWarps - 1) / kGatherWarps;
}

// Output positions that may read cell `cell`: a little more than those that do.
template <typename S>
__device__ __forceinline__ void reading_range(int32_t cell, S step, int32_t count, int32_t* begin, int32_t* end) {
  const S first = (static_cast<S>(cell) - S(0.5)) / step - S(2), last = (static_cast<S>(cell) + S(1.5)) / step + S(2);
  *begin = first > 0 ? static_cast<int32_t>(first) : 0;
  *end = last < static_cast<S>(count) ? static_cast<int32_t>(last) + 1 : count;
  *end = min(*end, count);
}

// The weight with which output position `dst` reads cell `cell`.
template <typename S>
__device__ __forceinline__ S reading_weight(int32_t dst, int32_t cell, S step, int32_t in) {
  const Tap<S> tap = bilinear_tap<S>(dst, step, in);
  return (tap.cell == cell ? 1 - tap.t : S(0)) + (min(tap.cell + 1, in - 1) == cell ? tap.t : S(0));
}

// A warp a cell: it gathers from the outputs that read the cell (no atomics: the order of the sum is fixed).
template <typename T, int kEntries>
__global__ void __launch_bounds__(kWarp* kGatherWarps)
    accumulate_backward_kernel(const __grid_constant__ CamGradients<kEntries> batch) {
  using S = Acc<T>;
  const CamGradient& entry = batch.entries[entry_of_block(batch.entries, batch.count, blockIdx.x)];
  const int32_t lane = threadIdx.x % kWarp;
  const int64_t cell = static_cast<int64_t>(blockIdx.x - entry.first_block) * kGatherWarps + threadIdx.x / kWarp;
  if (cell >= static_cast<int64_t>(entry.channels) * entry.height * entry.width) return;  // whole warps
  const int32_t j = cell % entry.width, i = cell / entry.width % entry.height;
  const int64_t channel = cell / entry.width / entry.height;
  const S step_y = static_cast<S>(entry.height) / static_cast<S>(entry.padded_height);
  const S step_x = static_cast<S>(entry.width) / static_cast<S>(entry.padded_width);
  int32_t y_begin, y_end, x_begin, x_end;
  reading_range(i, step_y, entry.rows, &y_begin, &y_end);
  reading_range(j, step_x, entry.columns, &x_begin, &x_end);
  const S* grads = static_cast<const S*>(entry.grads) + channel * entry.rows * entry.columns;
  S sum = 0;
  for (int32_t x = x_begin + lane; x < x_end; x += kWarp) {
    const S across = reading_weight(x, j, step_x, entry.width);
    S down = 0;
    for (int32_t y = y_begin; y < y_end; ++y) {
      const S weight = reading_weight(y, i, step_y, entry.height);
      if (weight != 0) down += weight * grads[static_cast<int64_t>(y) * entry.columns + x];
    }
    if (across != 0) sum += across * down;
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kFullWarp, sum, distance);
  if (lane < (entry.view_stride ? 2 : 1)) {  // lane v writes view v
    const int64_t at = lane * entry.view_stride + (channel * entry.height + i) * entry.width +
                       (lane == 0 ? j : entry.width - 1 - j);
    const bool passed = !batch.relu || !(widen(static_cast<const T*>(entry.map)[at]) <= 0);
    static_cast<T*>(entry.result)[at] = narrow<T>(passed ? sum : S(0));
  }
}

}  // namespace ribfast::cuda
