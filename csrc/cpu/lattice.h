// The permutohedral lattice of one set of points, and the CRF's kernels over it. Free of torch.
//
// Layout: `points` positions with `dims` features each, in tiles of kTile; what lies beyond the last point belongs to no
// vertex and has no weight. Arrays over corners are [tile][corner][kTile], so that one stream of memory feeds both a
// vector over points and one point after another. Vertices are numbered from 1 in the order in which points first touch them; 0 stands for every absent one and its
// values are 0.
#pragma once

#include <cstdint>

namespace ribfast::cpu {

constexpr int kMaxDims = 8;
constexpr int kTile = 16;  // lanes of the widest vector

constexpr int64_t tiles_of(int64_t points) { return (points + kTile - 1) / kTile; }

// Where the points of tiles [begin, end) lie (Adams et al. 2010, section 3): remainder-0 point, rank of each coordinate, weights.
struct EmbedJob {
  const float* features;  // [dim][points]
  int64_t points, begin, end;
  int32_t dims;
  float scale[kMaxDims];
  int32_t* base;   // [tile][dim][kTile]: coordinates of the remainder-0 point
  uint8_t* rank;   // [tile][dim + 1][kTile]
  float* weights;  // [tile][corner][kTile]
};

// One lattice as the pixel kernels see it.
struct LatticeView {
  const int32_t* corners;  // [tile][corner][kTile]
  const float* weights;    // likewise
  int32_t dims;
  float strength;     // what the filtered values are multiplied with in the energy
  // for each point of every tile:
  const float* before;  // factor of its value when it is splat, or null
  const float* after;   // factor of its sliced value, or null
  const float* ones;    // after * filter(before): the sum of all labels' messages; used where a label is left out
  const float* values;  // [vertex][channels], blurred: what is sliced; null before the first iteration
  float* splat;         // [vertex][channels]: what this pass adds to; null in the last
};

// One mean-field update of the points of tiles [begin, end): energies, softmax, and the splat of the result.
struct PixelJob {
  const LatticeView* lattices;
  int32_t count;
  int64_t begin, end;
  const float* negative_unary;  // [point of every tile][channels]; -inf in channels that pad
  int32_t channels;             // 1, or a multiple of 4
  bool reduced;                 // one label less than there are: the left-out one has energy 0 and 1 - sum of the rest
  bool exact;                   // the C library's exponential, and sums in the order of the labels
  float* probabilities;         // [point][channels], or null where they are not wanted
};

}  // namespace ribfast::cpu
