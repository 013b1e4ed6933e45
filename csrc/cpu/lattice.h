// The permutohedral lattice of one set of points, and the CRF's kernels over it. Free of torch.
//
// Layout: points stand in tiles of kTile; what lies beyond the last point belongs to no vertex and has no weight.
// Arrays over corners are [tile][corner][kTile], so that one stream of memory feeds both a vector over points and one
// point after another. Vertices are numbered from 1 in the order in which points first touch them; 0 stands for every
// absent one and its values are 0.
//
// Channels stand in blocks of 16, then 8, then 4 (over_blocks in lattice.inl), so that no block straddles a cache line:
// values of points ("rows") are [tile][block][kTile][width], values of vertices [block][vertex][width], where all
// blocks of 16 stand together as one wide block (neighbours in memory, and so on a page). A single channel is a block
// of 1.
#pragma once

#include <cstdint>

namespace ribfast::cpu {

constexpr int kMaxDims = 8;
constexpr int kTile = 16;     // lanes of the widest vector
constexpr int kTogether = 4;    // tiles of few channels that one step of a pass over the points takes
constexpr int kCornerScale = 4;  // corners are stored as vertex * kCornerScale: addresses then need one shift less
constexpr int32_t kMostVertices = (INT32_MAX - kTile) / kCornerScale;
constexpr int kLongestLine = 8;   // of vertices in a row, among those that are sorted by their length
constexpr int kSegments = kLongestLine;  // of an axis's lines: of 2, 3, ... kLongestLine vertices, and longer ones
constexpr int kLinksAhead = 32;   // zeros behind all links, for reads ahead
constexpr int kKeyWords = 2;  // a vertex's key: its coordinates in bit fields of one or two words

constexpr int64_t tiles_of(int64_t points) { return (points + kTile - 1) / kTile; }

// The block of a channel: its first channel and its width.
struct ChannelBlock {
  int32_t first, width;
};
constexpr ChannelBlock block_of(int32_t channel, int32_t channels) {
  if (channels == 1) return {0, 1};
  const int32_t whole = channels / 16 * 16, eight = channels & 8;
  if (channel < whole) return {channel / 16 * 16, 16};
  if (channel < whole + eight) return {whole, 8};
  return {whole + eight, 4};
}

// Where the points of tiles [begin, end) lie (Adams et al. 2010, section 3): keys of the corners, and weights.
struct EmbedJob {
  const float* features;  // [dim][feature_stride], of point begin * kTile on
  int64_t feature_stride, points, begin, end;
  int32_t dims, words;
  float scale[kMaxDims];
  int32_t lowest[kMaxDims];     // of each coordinate
  uint64_t unit[kMaxDims][kKeyWords];  // what one in a coordinate adds to a key
  float* weights;               // [tile][corner][kTile], of all tiles
  uint64_t* keys;               // [tile][word][corner][kTile], of tile `begin` on
};

// Vertices by keys of one word, open addressing. A key's hash is key * kHashFactor, its bits from kHashFold on folded
// onto the lowest; its slot the hash >> shift, or the next ones; a slot the low half of the hash and, above it, the
// vertex.
struct VertexSlots {
  const uint64_t* slots;
  const uint64_t* keys;  // of each vertex
  uint64_t mask;
  int32_t shift;
};
constexpr uint64_t kHashFactor = 0x9e3779b97f4a7c15ull;
constexpr int kHashFold = 29;

// One lattice as the kernels over points see it.
struct LatticeView {
  const int32_t* corners;  // [tile][corner][kTile], vertex * kCornerScale
  const float* weights;    // likewise
  int32_t dims;
  int64_t stride;      // vertices from one block of channels to the next
  float strength;      // what the filtered values are multiplied with in the energy
  const float* before;  // factor of each point's value when it is splat, or null
  const float* after;   // factor of its sliced value, or null
  const float* values;  // blurred: what is sliced; null before the first iteration
  float* splat;         // what this pass adds to; null in the last
  // vertices that a tile touches first are [touched[tile], touched[tile + 1]); where this is not null, the pass sets
  // them to 0 in `splat` before it adds to them, and whoever calls it does so with all the others
  const int32_t* touched;
};

// One mean-field update of the points of tiles [begin, end): energies, softmax, and the splat of the result.
//
// `parts` independent labellings share the lattices, `channels` of each: 1 (with one part), or a multiple of 4. In
// reduced form one label, the last, is left out: what is splat, and so the messages too, are differences from it.
struct PixelJob {
  const LatticeView* lattices;
  int32_t count;
  int64_t begin, end;
  int32_t channels, parts;
  int32_t group;  // 1, 2 or 4: so many channels in a row are one labelling (left_out is null); 0: all of a part are
  bool reduced;
  bool exact;      // pydensecrf's order of operations and the C library's exponential; never reduced
  int32_t labels;  // of a labelling, for `given`
  // energies, negated: rows with -inf in channels that pad; or, where null, from labels
  const float* negative_unary;
  const float* left_out;  // in reduced form: [tile][part][kTile], the left-out labels'; null: 0
  const uint8_t* given;  // [labelling][given_stride]
  int64_t given_stride;
  int32_t unsure;  // the given label that is none: all labels alike; or -1
  int32_t labellings;
  float gain, otherwise;  // negative energies of the given label and of the others
  float* probabilities;   // rows from tile `begin` on, or null where they are not wanted
  // with them, in reduced form: of groups and of one channel, rows in which each channel of a labelling holds it; else
  // [tile][part][kTile]
  float* left_out_probabilities;
};

}  // namespace ribfast::cpu
