// What maps attend to taken out of images, and the maps' gradient.
//
// Layout: images (N, C, H, W), erased and their gradient (P, C, H, W) of T, of any strides (Pixels); maps (P, height,
// width) of any float type and strides; arithmetic in S. A block is a strip: the rows of pixels between two rows of a
// map's cells. A thread goes down a column of it, where the four cells blend into two numbers once. Attention is linear
// in the cells, so its extremes lie at the corners of what pixels a cell has: every block finds them for itself. What
// the blocks of a map have added up is gathered by the last one to end, in a fixed order. A map of no image: zeros.
#pragma once

#include "common.cuh"

namespace ribfast::cuda {

constexpr int kEraseThreads = 128, kEraseWarps = kEraseThreads / kWarp;
constexpr int kLargestGroup = 64;  // 2^24 columns of as many channels are numbered in 32 bits
// Blocks that share a multiprocessor: those of 24 maps of 28 rows are all there at once.
template <typename S>
constexpr int kEraseBlocks = sizeof(S) == sizeof(float) ? 6 : 4;
constexpr int kRowsTogether = 64;  // of pixels where a map may have its extremes

enum MapStorage : int32_t { kDoubleMap, kFloatMap, kHalfMap, kBFloat16Map };

struct EraseMaps {
  const void* maps;
  int64_t map_stride, row_stride, column_stride;
  const int64_t* which;
  int64_t images;
  int32_t storage, height, width;   // of the maps
  int32_t channels, rows, columns;  // of the images
  int32_t group;                    // C where the channels of all pixels lie side by side (and C is small), else 1
  double step_y, step_x;            // height / rows, width / columns, rounded as the arithmetic is
  double sharpness, level;

  __device__ int64_t map() const { return blockIdx.x / static_cast<unsigned>(height); }
  __device__ int32_t strip() const { return static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(height)); }
  __device__ bool has_image() const { return which[map()] >= 0 && which[map()] < images; }
};

// Strides in elements.
struct Pixels {
  int64_t image, channel, row, column;
};

// The cells of the block's map.
template <typename M, typename S>
struct Cells {
  const M* cells;
  int64_t row_stride, column_stride;

  explicit __device__ Cells(const EraseMaps& maps)
      : cells(static_cast<const M*>(maps.maps) + maps.map() * maps.map_stride), row_stride(maps.row_stride),
        column_stride(maps.column_stride) {}
  __device__ S given(int32_t y, int32_t x) const { return widen(cells[y * row_stride + x * column_stride]); }
  __device__ S rectified(int32_t y, int32_t x) const {
    const S cell = given(y, x);
    return cell < 0 ? S(0) : cell;  // NaN stays
  }
};

// Calls f(Cells) of the maps' type.
template <typename S, typename F>
__device__ __forceinline__ void with_cells(const EraseMaps& maps, F&& f) {
  if constexpr (std::is_same_v<S, double>) {
    f(Cells<double, S>(maps));
  } else {
    switch (maps.storage) {
      case kHalfMap: return f(Cells<__half, S>(maps));
      case kBFloat16Map: return f(Cells<__nv_bfloat16, S>(maps));
      default: return f(Cells<float, S>(maps));
    }
  }
}

// Rows, or columns, of pixels and of cells.
template <typename S>
struct Axis {
  int32_t pixels, cells;
  S step;

  static __device__ Axis y(const EraseMaps& maps) { return {maps.rows, maps.height, static_cast<S>(maps.step_y)}; }
  static __device__ Axis x(const EraseMaps& maps) { return {maps.columns, maps.width, static_cast<S>(maps.step_x)}; }
  __device__ int32_t first(int32_t cell) const { return first_pixel(cell, step, pixels, cells); }
};

// Where a pixel lies between cells: (1 - t) cell + t next. Beyond the last cell both are that cell.
template <typename S>
struct Place {
  int32_t cell, next;
  S t;

  __device__ Place(int32_t pixel, const Axis<S>& axis) {
    const Tap<S> tap = bilinear_tap<S>(pixel, axis.step, axis.cells);
    cell = tap.cell, next = min(cell + 1, axis.cells - 1), t = cell < next ? tap.t : S(0);
  }
  // A row of cells where the pixel is in it.
  template <typename M>
  __device__ S in_row(const Cells<M, S>& cells, int32_t row) const {
    return (1 - t) * cells.rectified(row, cell) + t * cells.rectified(row, next);
  }
  __device__ S weight(int32_t of) const { return (of == cell ? 1 - t : S(0)) + (of == next ? t : S(0)); }
};

// The first, then the last pixel of the cells' one after another; -1 where a cell has none.
template <typename S>
__device__ __forceinline__ int32_t candidate(int32_t i, const Axis<S>& axis) {
  const int32_t begin = axis.first(i / 2), end = axis.first(i / 2 + 1);
  return begin == end ? -1 : i % 2 ? end - 1 : begin;
}

struct Smaller {  // NaN wins
  template <typename S>
  __device__ S operator()(S a, S b) const {
    return a < b || a != a ? a : b;
  }
};

template <typename S>
struct EraseScratch {
  int32_t row[kRowsTogether], cell[kRowsTogether], next[kRowsTogether];
  S t[kRowsTogether];
  S values[kWarp];
  int64_t places[kWarp];
};

// Of a map's pixels the least and the largest, known to all threads, and the first place (row, column) of each.
template <typename S>
struct MapExtremes {
  S low, high;
  int64_t low_at, high_at;
  bool rounding;

  template <bool kPlaces>
  __device__ void find(const EraseMaps& maps, EraseScratch<S>& scratch) {
    low = INFINITY, high = -INFINITY, low_at = high_at = 0;
    with_cells<S>(maps, [&](const auto& cells) { look_at<kPlaces>(cells, maps, scratch); });
    const S own_low = low, own_high = high;
    low = block_reduce(low, Smaller(), scratch.values);
    __syncthreads();
    high = block_reduce(high, Larger(), scratch.values);
    __syncthreads();
    rounding = high - low <= S(1e-5) * high;
    if constexpr (kPlaces) {
      constexpr int64_t kNowhere = int64_t{1} << 62;
      low_at = block_reduce(own_low == low ? low_at : kNowhere, Smaller(), scratch.places);
      __syncthreads();
      high_at = block_reduce(own_high == high ? high_at : kNowhere, Smaller(), scratch.places);
      __syncthreads();
    }
  }

  // A thread's own extremes: warps share rows, lanes columns.
  template <bool kPlaces, typename M>
  __device__ void look_at(const Cells<M, S>& cells, const EraseMaps& maps, EraseScratch<S>& scratch) {
    const auto thread = static_cast<int32_t>(threadIdx.x);
    const auto y = Axis<S>::y(maps), x = Axis<S>::x(maps);
#pragma unroll 1
    for (int32_t first = 0; first < 2 * maps.height; first += kRowsTogether) {
      const int32_t count = min(kRowsTogether, 2 * maps.height - first);
      if (thread < count) {
        const int32_t row = candidate(first + thread, y);
        const Place<S> place(max(row, 0), y);
        scratch.row[thread] = row, scratch.cell[thread] = place.cell, scratch.next[thread] = place.next;
        scratch.t[thread] = place.t;
      }
      __syncthreads();
#pragma unroll 1
      for (int32_t i = thread % kWarp; i < 2 * maps.width; i += kWarp) {
        const int32_t column = candidate(i, x);
        if (column < 0) continue;
        const Place<S> place(column, x);
#pragma unroll 1
        for (int32_t r = thread / kWarp; r < count; r += kEraseWarps) {
          if (scratch.row[r] < 0) continue;
          const S t = scratch.t[r];
          const S value = (1 - t) * place.in_row(cells, scratch.cell[r]) + t * place.in_row(cells, scratch.next[r]);
          if constexpr (kPlaces) {
            const int64_t at = int64_t{scratch.row[r]} << 32 | column;
            if (value < low || value != value || (value == low && at < low_at)) low = value, low_at = at;
            if (value > high || value != value || (value == high && at < high_at)) high = value, high_at = at;
          } else {
            low = Smaller()(low, value), high = Larger()(high, value);
          }
        }
      }
      __syncthreads();
    }
  }

  // Of a cell, or of what lies between cells.
  __device__ S attention(S value) const { return rounding ? S(0) : quotient(value - low, high - low); }
};

// Attention down a column of a strip: above + t (below - above).
template <typename S>
struct Column {
  S above, below;

  __device__ Column(const EraseMaps& maps, const MapExtremes<S>& extremes, const Place<S>& place) {
    const int32_t cell = maps.strip(), next = min(cell + 1, maps.height - 1);
    with_cells<S>(maps, [&](const auto& cells) {
      above = extremes.attention(place.in_row(cells, cell)), below = extremes.attention(place.in_row(cells, next));
    });
  }
};

__device__ __forceinline__ float exp_of(float x) { return __expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

// Of a pixel, by what the attention is above the level.
template <typename S>
__device__ __forceinline__ S kept_of(S z) {
  return quotient(S(1), S(1) + exp_of(z));
}

// Whether all other blocks of the map have ended; what they have written is then to be read past the first-level cache.
__device__ __forceinline__ bool is_last_block(const EraseMaps& maps, int32_t* done) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(done + maps.map(), 1) == maps.height - 1;
  __syncthreads();
  return last;
}

// done: of each map, zeros; partial: of each block.
template <typename T, typename S>
__global__ void __launch_bounds__(kEraseThreads, kEraseBlocks<S>)
    erase_kernel(EraseMaps maps, const T* __restrict__ images, Pixels from, T* __restrict__ erased, Pixels to,
                 S* partial, int32_t* done, S* areas) {
  __shared__ EraseScratch<S> scratch;
  const bool has_image = maps.has_image();
  MapExtremes<S> extremes;
  extremes.template find<false>(maps, scratch);
  const T* image = images + (has_image ? maps.which[maps.map()] * from.image : 0);
  T* result = erased + maps.map() * to.image;
  const auto axis_y = Axis<S>::y(maps), axis_x = Axis<S>::x(maps);
  const int32_t begin = axis_y.first(maps.strip()), end = axis_y.first(maps.strip() + 1);
  const int32_t planes = maps.group > 1 ? 1 : maps.channels, elements = maps.columns * maps.group;
  const auto sharpness = static_cast<S>(maps.sharpness), level = static_cast<S>(maps.level);
  S sum = 0;
#pragma unroll 1
  for (auto i = static_cast<int32_t>(threadIdx.x); i < elements; i += kEraseThreads) {
    const int32_t x = i / maps.group, channel = i % maps.group;
    const Column<S> column(maps, extremes, Place<S>(x, axis_x));
#pragma unroll 1
    for (int32_t plane = channel; plane < channel + planes; ++plane) {
      const T* in = image + plane * from.channel + x * from.column;
      T* out = result + plane * to.channel + x * to.column;
#pragma unroll 4
      for (int32_t y = begin; y < end; ++y) {
        const S a = column.above + Place<S>(y, axis_y).t * (column.below - column.above);
        if (plane == 0) sum += a;
        const S value = has_image ? kept_of(sharpness * (a - level)) * static_cast<S>(widen(in[y * from.row])) : S(0);
        out[y * to.row] = narrow<T>(static_cast<Acc<T>>(value));
      }
    }
  }
  sum = block_reduce(sum, Plus(), scratch.values);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
  if (!is_last_block(maps, done)) return;
  S total = 0;
#pragma unroll 1
  for (auto i = static_cast<int32_t>(threadIdx.x); i < maps.height; i += kEraseThreads) {
    total += __ldcg(partial + maps.map() * maps.height + i);
  }
  total = block_reduce(total, Plus(), scratch.values);
  if (threadIdx.x == 0) areas[maps.map()] = has_image ? total : S(0);
}

// The gradient of the attention at a cell, from the corners of four strips' cells: see erase_backward_kernel.
template <typename S>
__device__ __forceinline__ S gathered(const EraseMaps& maps, const S* partial, int32_t y, int32_t x) {
  S sum = 0;
  for (int corner = 0; corner < 4; ++corner) {
    const int32_t strip = y - corner / 2, cell = x - corner % 2;
    if (strip < 0 || cell < 0) continue;
    sum += __ldcg(partial + ((maps.map() * maps.height + strip) * 4 + corner) * maps.width + cell);
  }
  return sum;
}

// Calls f(y, x) for each cell of the block's map, a warp a row.
template <typename F>
__device__ __forceinline__ void each_cell(const EraseMaps& maps, F&& f) {
#pragma unroll 1
  for (auto y = static_cast<int32_t>(threadIdx.x / kWarp); y < maps.height; y += kEraseWarps) {
#pragma unroll 1
    for (auto x = static_cast<int32_t>(threadIdx.x % kWarp); x < maps.width; x += kWarp) f(y, x);
  }
}

// 0 where the cell is not above 0.
template <typename M, typename S>
__device__ __forceinline__ void write_gradient(const EraseMaps& maps, const Cells<M, S>& cells, void* result, int32_t y,
                                               int32_t x, S value) {
  const int64_t at = (maps.map() * maps.height + y) * maps.width + x;
  static_cast<M*>(result)[at] = narrow<M>(cells.given(y, x) <= 0 ? S(0) : value);
}

// grads and grad_areas may be null. partial (P, height, 4, width): of each strip what the pixels between two columns
// add to the four cells around them: above left, above right, below left, below right. result (P, height, width) of the
// maps' type.
template <typename T, typename S>
__global__ void __launch_bounds__(kEraseThreads, kEraseBlocks<S>)
    erase_backward_kernel(EraseMaps maps, const T* __restrict__ images, Pixels from, const T* __restrict__ grads,
                          Pixels of_grads, const S* grad_areas, S* partial, int32_t* done, void* result) {
  __shared__ EraseScratch<S> scratch;
  __shared__ S above[kEraseThreads], below[kEraseThreads], rights[kEraseThreads];
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int64_t map = maps.map();
  MapExtremes<S> extremes;
  extremes.template find<true>(maps, scratch);
  if (!maps.has_image() || extremes.rounding) {
    if (maps.strip() > 0) return;
    with_cells<S>(maps, [&](const auto& cells) {
      each_cell(maps, [&](int32_t y, int32_t x) { write_gradient(maps, cells, result, y, x, S(0)); });
    });
    return;
  }
  S* own = partial + static_cast<int64_t>(blockIdx.x) * 4 * maps.width;
#pragma unroll 1
  for (int32_t i = thread; i < 4 * maps.width; i += kEraseThreads) own[i] = 0;
  __syncthreads();
  const T* image = images + maps.which[map] * from.image;
  const T* grad = grads ? grads + map * of_grads.image : nullptr;
  const S grad_area = grad_areas ? grad_areas[map] : S(0);
  const auto axis_y = Axis<S>::y(maps), axis_x = Axis<S>::x(maps);
  const int32_t begin = axis_y.first(maps.strip()), end = axis_y.first(maps.strip() + 1);
  const int32_t planes = maps.group > 1 ? 1 : maps.channels, elements = maps.columns * maps.group;
  const auto sharpness = static_cast<S>(maps.sharpness), level = static_cast<S>(maps.level);
#pragma unroll 1
  for (int32_t first = 0; first < elements; first += kEraseThreads) {
    const int32_t i = first + thread, here = min(first + kEraseThreads, elements);
    S sum = 0, lower = 0, right = 0;
    if (i < here) {
      const int32_t x = i / maps.group, channel = i % maps.group;
      const Place<S> place(x, axis_x);
      const Column<S> column(maps, extremes, place);
      right = place.t;
#pragma unroll 1
      for (int32_t plane = channel; grad && plane < channel + planes; ++plane) {
        const T* in = image + plane * from.channel + x * from.column;
        const T* slope = grad + plane * of_grads.channel + x * of_grads.column;
#pragma unroll 4
        for (int32_t y = begin; y < end; ++y) {
          const S t = Place<S>(y, axis_y).t, a = column.above + t * (column.below - column.above);
          const S kept = kept_of(sharpness * (a - level));
          const S product = static_cast<S>(widen(in[y * from.row])) * static_cast<S>(widen(slope[y * of_grads.row]));
          const S d = -sharpness * kept * (1 - kept) * product;
          sum += d, lower += t * d;
        }
      }
#pragma unroll 1
      for (int32_t y = begin; channel == 0 && grad_areas && y < end; ++y) {
        sum += grad_area, lower += Place<S>(y, axis_y).t * grad_area;
      }
    }
    above[thread] = sum - lower, below[thread] = lower, rights[thread] = right;
    __syncthreads();
    const int32_t first_cell = Place<S>(first / maps.group, axis_x).cell;
    const int32_t last_cell = Place<S>((here - 1) / maps.group, axis_x).cell;
#pragma unroll 1
    for (int32_t task = thread; task < 4 * (last_cell - first_cell + 1); task += kEraseThreads) {
      const int32_t cell = first_cell + task / 4, corner = task % 4;
      const int32_t e_end = min(axis_x.first(cell + 1) * maps.group, here);
      S part = 0;
#pragma unroll 1
      for (int32_t e = max(axis_x.first(cell) * maps.group, first); e < e_end; ++e) {
        const S value = corner < 2 ? above[e - first] : below[e - first];
        part += (corner % 2 ? rights[e - first] : 1 - rights[e - first]) * value;
      }
      own[corner * maps.width + cell] += part;
    }
    __syncthreads();
  }
  if (!is_last_block(maps, done)) return;
  with_cells<S>(maps, [&](const auto& cells) {
    S total = 0, of_attention = 0;
    each_cell(maps, [&](int32_t y, int32_t x) {
      const S sum = gathered(maps, partial, y, x);
      total += sum;
      if (sum != 0) of_attention += sum * extremes.attention(cells.rectified(y, x));  // unread cells may be infinite
    });
    total = block_reduce(total, Plus(), scratch.values);
    __syncthreads();
    of_attention = block_reduce(of_attention, Plus(), scratch.values);
    const Place<S> low_y(static_cast<int32_t>(extremes.low_at >> 32), axis_y);
    const Place<S> low_x(static_cast<int32_t>(extremes.low_at & 0xffffffff), axis_x);
    const Place<S> high_y(static_cast<int32_t>(extremes.high_at >> 32), axis_y);
    const Place<S> high_x(static_cast<int32_t>(extremes.high_at & 0xffffffff), axis_x);
    each_cell(maps, [&](int32_t y, int32_t x) {
      S value = gathered(maps, partial, y, x);
      value += (of_attention - total) * (low_y.weight(y) * low_x.weight(x));
      value -= of_attention * (high_y.weight(y) * high_x.weight(x));
      write_gradient(maps, cells, result, y, x, quotient(value, extremes.high - extremes.low));
    });
  });
}

}  // namespace ribfast::cuda
