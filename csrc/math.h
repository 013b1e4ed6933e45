// Scalar arithmetic that host and device kernels share. Free of torch.
// Include it by a relative path: with csrc/ on the include path it would hide the C library's <math.h>.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RIBFAST_HD __host__ __device__ __forceinline__
#else
#define RIBFAST_HD inline
#endif

namespace ribfast {
namespace {  // internal linkage: each CPU tier must keep its own copy

// Where output position `dst` of a bilinear (align_corners=False) resize reads: input cells `cell` and `cell + 1`
// (clamped to in - 1) with weights 1 - t and t.
template <typename S>
struct Tap {
  int32_t cell;
  S t;
};

template <typename S>
RIBFAST_HD Tap<S> bilinear_tap(int32_t dst, S step, int32_t in) {
  S position = step * (static_cast<S>(dst) + S(0.5)) - S(0.5);
  position = position < 0 ? S(0) : position;
  int32_t cell = static_cast<int32_t>(position);
  cell = cell < in - 1 ? cell : in - 1;
  const S t = position - static_cast<S>(cell);
  return {cell, t < 1 ? t : S(1)};
}

// U_tau of one map with maximum `top`: is x / top on the kept side of tau?
template <typename S>
RIBFAST_HD bool is_kept(S x, S top, S tau, bool strict) {
  const S level = x / top;
  return strict ? level < tau : level <= tau;
}

// What becomes of a pixel's loss l under pretended under-fitting: min(l, k), 0 above k, or l ** k, which has an infinite
// slope at 0: below kLeastLoss it is the chord from there to 0.
enum Fit : int32_t { kFitAll, kClampLoss, kIgnoreLoss, kPowerOfLoss };
constexpr float kLeastLoss = 1e-6f;
constexpr uint8_t kIgnoredLabel = 255;
constexpr float kRoughLoss = 64.0f;  // above it a loss is rounded by more than the gradient's probabilities may be off

// Pairs of pixels closer than a radius, from the one that is first in the order of rows: (0, 1) .. (0, radius - 1),
// then rows of what is below.
constexpr int kLargestRadius = 16;

RIBFAST_HD int32_t widest_column(int32_t y, int32_t radius) {  // the largest x with y y + x x < radius radius
  int32_t x = radius - 1;
  while (y * y + x * x >= radius * radius) --x;
  return x;
}

RIBFAST_HD int32_t count_pairs(int32_t radius) {
  int32_t count = radius - 1;
  for (int32_t y = 1; y < radius; ++y) count += 2 * widest_column(y, radius) + 1;
  return count;
}

// The columns of row `row` on the path from (0, 0) to (y, x), 0 <= row <= y: those of its bounding box that are closer
// than 1 to the line.
struct PathColumns {
  int32_t first, last;
};

RIBFAST_HD PathColumns path_columns(int32_t y, int32_t x, int32_t row) {
  const int32_t low = x < 0 ? x : 0, high = x < 0 ? 0 : x, limit = y * y + x * x;
  const auto on_path = [&](int32_t column) {
    const int32_t area = y * column - x * row;
    return area * area < limit;
  };
  PathColumns columns{low, high};
  while (!on_path(columns.first)) ++columns.first;
  while (!on_path(columns.last)) --columns.last;
  return columns;
}

}  // namespace
}  // namespace ribfast
