// How the kernels of pairs of pixels see their maps: in the middle of margins that every path stays inside. Free of
// torch.
#pragma once

#include <cstdint>

namespace ribfast::cpu {

constexpr int64_t kMargin = 16;  // columns at the left, and behind the last vector at the right; at least radius - 1

constexpr int kClassesTogether = 4;  // that a walk takes through the weights at once

// The pairs of a radius on planes whose rows are `stride` apart.
struct PairTable {
  int32_t count, radius;
  int64_t stride;
  const int32_t *y, *x;
  const int32_t* cells;  // of pair p, [first[p], first[p + 1]): its path's pixels, relative to the pair's beginning
  const int32_t* first;
};

// One row of an image, at its column 0 in planes of floats; labels: 255 in the margins.
struct PairRow {
  const float *boundary, *displacement_y, *displacement_x;
  const int32_t* labels;
  int64_t width;
};

// A row of the walk, or of a Chebyshev series of it: next = T current, or 2 T current - next; result += factor * next.
// Classes are `plane` apart. weights: rows of `pairs` strips, a strip `strip` long; 0 for pairs that leave the map, and
// in the margins. inverse: 1 / the sum of each column of T before division, 0 in the margins.
struct WalkJob {
  const float *weights, *inverse, *current;
  float *next, *result;  // result may be null
  const int32_t *y, *x;  // of the pairs
  int64_t pairs, strip, stride, plane, width;
  float factor;
  bool twice;
};

}  // namespace ribfast::cpu
