// The CPU kernels of one tier, as a table of plain functions over raw memory. Free of torch.
#pragma once

#include <cstdint>

#include "erase.h"
#include "lattice.h"
#include "losses.h"
#include "pairs.h"

namespace ribfast::cpu {

// How maps are stored; sums are held in double for kDouble, else in float.
enum Storage { kDouble, kFloat, kHalf, kBFloat16, kStorages };

// One image's scale, as accumulate and its backward read it. All arrays belong to the caller.
struct CamScale {
  const void* map;      // view 0 of the channel at hand, (height, width) contiguous
  int64_t view_stride;  // elements from view 0 to view 1; 0 where there is one view
  int32_t height, width;
  const int32_t* row_cell;  // tap of each output row: cells and weights (math.h)
  const void* row_t;
  const int32_t* column_cell;  // tap of each output column, padded to `columns`
  const void* column_t;
};

struct CamJob {
  const CamScale* scales;
  int32_t count;
  int64_t row_begin, row_end;
  int64_t width;    // of the output
  int64_t columns;  // width rounded up to kColumnBlock
  bool relu;
  void* scratch;  // cam_scratch() bytes
};

constexpr int64_t kColumnBlock = 16;  // lanes of the widest vector
constexpr int64_t kCacheLine = 64;

// Bytes of a job's scratch, for `count` scales whose widest map has `widest` columns.
constexpr int64_t cam_scratch(int64_t count, int64_t columns, int64_t widest, int64_t accumulator_size) {
  return (2 * count * columns + widest + 2 * kColumnBlock) * accumulator_size + kCacheLine;
}

// A row (one output channel) of a convolution's weights with their batch normalisation folded in. All float32 but grad,
// anchor (may be null) and folded.
struct FoldedRow {
  const void *grad, *anchor;
  const float* weight;
  float *result, *velocity;  // result may be weight
  void* folded;
  int64_t n;
  float scale, folded_scale;  // from the folded gradient to the weight's, from the new weight to the folded one
  float rate, momentum, decay;
  bool first;
};

// Local refinement of one image's maps (refine.inl): planes of height rows, `stride` floats apart, `plane` floats from
// one plane to the next.
struct RefineJob {
  const int32_t *rows, *columns;  // of each neighbour, from its pixel; columns within what rows are readable for
  const float* position;          // what is added to each neighbour's weight; null: PAMR
  float w1;                       // PAR's
  int32_t neighbours;             // 8 for each dilation
  int64_t height, width, stride, plane;
};

constexpr int64_t kRefineBlock = 16;  // pixels whose weights lie together
constexpr int kMostRefineNeighbours = 128;

constexpr int64_t kHistogramCopies = 4;

// What threshold_row counts, and where (histogram.inl).
struct ThresholdRow {
  int64_t planes;  // classes on the image, at least 1
  int64_t plane;   // elements from a class's row to the next class's
  int64_t width;
  int64_t bins;  // thresholds + 1
  const float* cells;
  const float* edges;  // the thresholds, ascending, and infinity
  int32_t n_cells;
  float low, scale;
  int32_t steps;
  const int32_t* label_rows;  // of each of 256 labels: where its counts (planes, bins) begin
  uint32_t* counts;
  int64_t copy;
};

struct Kernels {
  const char* name;
  int32_t lanes;  // of float
  // One map of n positions -> pooled value and stats {maximum, divisor}, in accumulators.
  void (*gndrp[kStorages])(const void* map, int64_t n, bool present, double tau, bool divide_by_all, bool strict,
                           void* pooled, void* stats);
  // grad: one accumulator; result in the map's storage.
  void (*gndrp_backward[kStorages])(const void* map, int64_t n, bool present, double tau, bool strict,
                                    const void* stats, const void* grad, void* result);
  // Rows of one channel; out (rows of the whole channel, `width` apart) is set, or added to.
  void (*accumulate[kStorages])(const CamJob& job, void* out, bool add);
  // One scale of one channel: the gradient of its map (storage; same strides as the map) from (row_end, width) grads.
  void (*accumulate_backward[kStorages])(const CamJob& job, const void* grads, void* result);
  // One map of n positions, result may be the map itself.
  void (*normalize[kStorages])(const void* map, int64_t n, double eps, void* result);
  // In place, and its gradient (adapt.inl); channels of a cell one after another; shortcut and mask may be null.
  void (*activate[kStorages])(void* y, const void* shortcut, const void* mask, int64_t cells, int64_t channels,
                              double limit);
  void (*activate_backward[kStorages])(const void* grad, const void* y, int64_t cells, int64_t channels, double limit,
                                       void* result, void* sums);
  float (*folded_dot[kStorages])(const FoldedRow& row);  // not of double
  void (*folded_move[kStorages])(const FoldedRow& row);
  // Pairs of pixels, a row at a time (pairs.h, pairs.inl).
  void (*path_affinity)(const PairTable& pairs, const float* row, int64_t width, double beta, float* out,
                        int64_t plane);
  void (*path_affinity_backward)(const PairTable& pairs, const float* row, int64_t width, double beta,
                                 const float* grad, int64_t plane, float* result);
  void (*pair_losses)(const PairTable& pairs, const PairRow& row, double* sums);
  void (*pair_losses_backward)(const PairTable& pairs, const PairRow& row, const float* grads, float* boundary,
                               float* displacement_y, float* displacement_x);
  void (*walk[kClassesTogether])(const WalkJob& job, int64_t begin, int64_t end);  // rows, of 1, 2, ... classes
  // A segmentation's losses, a row at a time (losses.h, losses.inl). Logits: not of double.
  void (*read_logits[kStorages])(const void* logits, int64_t label_stride, int64_t column_stride, int32_t n_labels,
                                 int64_t columns, int64_t padded, float* row);
  void (*write_logits[kStorages])(const float* a, const float* b, int32_t n_labels, int64_t columns, int64_t padded,
                                  int64_t label_stride, void* result);
  int32_t (*pixel_losses)(const LossRow& row, float* losses);
  void (*pixel_loss_sums)(const float* losses, const uint8_t* labels, int64_t n, int32_t n_labels, const LossFit& fit,
                          double* sums);
  void (*pixel_losses_backward)(const LossRow& row, const float* losses, const float* weights, const LossFit& fit,
                                float* low, float* high);
  // A strip of pixels, of images in a storage, with arithmetic in float or double (erase.h, erase.inl).
  double (*erase[2][kStorages])(const EraseStrip& strip, const PixelRows& image, const PixelRows& erased);
  void (*erase_backward[2][kStorages])(const EraseStrip& strip, const PixelRows& image, const PixelRows& grad,
                                       double grad_area, void* low, void* high);
  // A row of weights from the image's three planes; a row of all classes from them, out: that row of the first plane.
  void (*affinities)(const RefineJob& job, const float* image, int64_t row, float* weights);
  void (*refine_row)(const RefineJob& job, const float* in, const float* weights, int64_t classes, int64_t row,
                     float* out, int64_t out_plane);
  // One row of an image; false if its maps hold NaN. Not of double.
  bool (*threshold_row[kStorages])(const ThresholdRow& row, const void* maps, const uint8_t* mask);
  // The lattice's (lattice.h has the layouts).
  void (*embed)(const EmbedJob& job);
  // found[i]: the vertex of keys[i] + move, or 0
  void (*find)(const VertexSlots& table, const uint64_t* keys, uint64_t move, int64_t count, int32_t* found);
  // One block of `width` channels (16 n, 8, 4 or 1), in place, along the lines of one axis that have `length` vertices,
  // or more than kLongestLine. links [begin, end) begin and end between lines, and are followed by kLinksAhead more.
  void (*blur)(float* values, const int32_t* links, int64_t begin, int64_t end, int32_t length, int32_t spare,
               int32_t width);
  // One axis of one channel, from one buffer to another; everything has room up to the multiple of kTile behind `end`.
  void (*blur_one)(const float* in, const int32_t* before, const int32_t* after, int64_t begin, int64_t end,
                   float* out);
  // Rows of tiles [begin, end); channels: 1 or a multiple of 4. splat adds; rows null, with one channel: ones.
  void (*slice)(const LatticeView& lattice, int64_t begin, int64_t end, int32_t channels, float* rows);
  void (*splat)(const LatticeView& lattice, int64_t begin, int64_t end, int32_t channels, const float* rows);
  // scratch: room for the rows of kTogether tiles; unused where job.probabilities is not null.
  void (*update)(const PixelJob& job, float* scratch);
};

// The tier that torch itself runs on (ATEN_CPU_CAPABILITY steers both), or the best compiled one below it.
const Kernels& kernels();
const char* compiled_tiers();  // names, separated by spaces

extern const Kernels tier_default;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RIBFAST_X86_TIERS 1
extern const Kernels tier_avx2;
extern const Kernels tier_avx512;
#endif

}  // namespace ribfast::cpu
