// The permutohedral lattice on CUDA (Adams, Baek & Davis 2010, rounding as Kraehenbuehl & Koltun's): built on the
// device without a word from the host, and filtering over it.
//
// Layout: points in tiles of kTilePoints, one block each: consecutive points, or 16 x 16 pixels of an image (those
// outside it belong to no vertex and have no weight). Corners and weights stand as the CPU's do,
// [points / 16][corner][16]. Within a tile the vertices that it touches are numbered in the order of first touch, by
// points ascending, corners inner; such a pair of tile and vertex is a run, with the number
// tile * kTilePoints * (d + 1) + local number. Vertices of the lattice are numbered from 1 in the order in which runs
// first touch them; 0 stands for every absent one.
//
// A run's points are summed by the tile, in a fixed order, into a row of `partial`; the rows of a vertex are
// consecutive, tiles ascending, and summed by a second kernel. No floating-point atomics: the same bits every time.
//
// Capacity: more vertices than `capacity` set status[kOverflow]; what is left out then has vertex 0. Nothing is written
// out of bounds, but no result of such a lattice is right.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "common.cuh"

namespace ribfast::cuda {

constexpr int kMaxDims = 8;
constexpr int kTileSide = 16, kTilePoints = kTileSide * kTileSide;
constexpr int kScanThreads = 1024;
constexpr int kVertices = 0, kOverflow = 1;  // of Lattice::status

struct Lattice {
  // points: either features [point][dim], or pixels of an image by (x, y) / deviation and, for 5 dims, colour
  const float* features;
  const uint8_t* image;  // [pixel][3]
  float space_deviation, colour_deviation;
  int32_t height, width;  // 0 for features
  int32_t points, padded, tiles, dims, capacity;  // padded: points that corners and weights have room for
  uint32_t mask;  // slots - 1
  bool filled;    // up to a multiple of four by points at the origin, without weight, as pydensecrf's
  float scale[kMaxDims];

  // the lattice
  float* weights;         // [padded / 16][corner][16]
  uint16_t* local;        // likewise: the corner's vertex among the tile's
  uint16_t* order;        // [tile][entry]: corner * kTilePoints + point, by local vertex
  uint16_t* starts;       // [tile][entries + 1]: where a local vertex starts in `order`
  int32_t* runs;          // [tile]: distinct vertices
  int32_t* vertex;        // [run]; while building, its slot
  int32_t* row;           // [run]: of `partial`, or -1
  int32_t* rows;          // [vertex + 1]: where a vertex starts in `partial`
  int32_t* neighbours;    // [axis][capacity + 1][before, after]
  int32_t* status;
  float* factor;  // [point of every tile]: of the normalisation

  // while building
  int32_t* records;    // [point of every tile][dims + 1]: the remainder-0 point, and four bits for each rank
  uint16_t* entries;   // [run]: point of the tile * (dims + 1) + corner that touches first
  int32_t* slots;      // hash table: the first entry (point * (dims + 1) + corner) with a key, or -1
  int32_t* number;     // [slot]: vertex
  int32_t* first;      // [vertex]: entry
  int32_t* count;      // [vertex]: runs
  int32_t* cursor;     // [vertex]
  int32_t* list;       // runs by vertex, not in order
  int32_t* tile_first;  // [tile + 1]: vertices of the tiles before
  int32_t* tile_rows;   // [tile + 1]: runs of those vertices
};

// Hands out pieces of one buffer; without one, counts what they need.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;

  template <typename T>
  void take(T*& pointer, int64_t count) {
    if (base != nullptr) pointer = reinterpret_cast<T*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
  }
};

// What does not depend on memory; points of an image where features is null. False where there are too many points.
inline bool describe(Lattice& lattice, int32_t dims, int64_t points, int64_t height, int64_t width, int64_t capacity,
                     bool filled) {
  const int64_t tiles = height == 0 ? (points + kTilePoints - 1) / kTilePoints
                                    : ((height + kTileSide - 1) / kTileSide) * ((width + kTileSide - 1) / kTileSide);
  lattice.filled = filled && points % 4 != 0;
  const int64_t entries = tiles * kTilePoints * (dims + 1), most = (points + lattice.filled) * (dims + 1);
  if (entries * 3 >= (int64_t{1} << 31)) return false;
  lattice.dims = dims, lattice.points = static_cast<int32_t>(points), lattice.tiles = static_cast<int32_t>(tiles);
  lattice.height = static_cast<int32_t>(height), lattice.width = static_cast<int32_t>(width);
  lattice.padded = static_cast<int32_t>(height == 0 ? (points + 15) / 16 * 16 : tiles * kTilePoints);
  lattice.capacity = static_cast<int32_t>(capacity <= 0 || capacity > most ? most : capacity);
  lattice.mask = 1023;
  while (lattice.mask + int64_t{1} < entries + entries / 2) lattice.mask = 2 * lattice.mask + 1;
  const auto spread = static_cast<float>(std::sqrt(2.0 / 3.0) * (dims + 1));  // rounded, as pydensecrf's is
  for (int32_t i = 0; i < dims; ++i) {
    lattice.scale[i] = static_cast<float>(1.0 / std::sqrt((i + 2.0) * (i + 1.0)) * spread);
  }
  return true;
}

// Beside weights and neighbours: what filtering reads.
inline void take_tables(Lattice& lattice, Arena& arena) {
  const int64_t entries = int64_t{lattice.tiles} * kTilePoints * (lattice.dims + 1);
  arena.take(lattice.local, int64_t{lattice.padded} * (lattice.dims + 1));
  arena.take(lattice.order, entries);
  arena.take(lattice.starts, entries + lattice.tiles);
  arena.take(lattice.runs, lattice.tiles);
  arena.take(lattice.vertex, entries);
  arena.take(lattice.row, entries);
  arena.take(lattice.rows, lattice.capacity + int64_t{2});
}

// What only building needs.
inline void take_scratch(Lattice& lattice, Arena& arena) {
  const int64_t points = int64_t{lattice.tiles} * kTilePoints, vertices = lattice.capacity + int64_t{1};
  arena.take(lattice.records, points * (lattice.dims + 1));
  arena.take(lattice.entries, points * (lattice.dims + 1));
  arena.take(lattice.list, points * (lattice.dims + 1));
  arena.take(lattice.slots, lattice.mask + int64_t{1});
  arena.take(lattice.number, lattice.mask + int64_t{1});
  arena.take(lattice.first, vertices);
  arena.take(lattice.count, vertices);
  arena.take(lattice.cursor, vertices);
  arena.take(lattice.tile_first, lattice.tiles + int64_t{1});
  arena.take(lattice.tile_rows, lattice.tiles + int64_t{1});
}

// Descriptions travel by value as a kernel's argument: nothing is copied from the host, and it can be captured.
template <typename Entry>
struct Descriptions {
  static constexpr int kMost = 4000 / sizeof(Entry) < 128 ? 4000 / sizeof(Entry) : 128;
  Entry entries[kMost];
  int32_t count;
};

template <typename Entry>
__global__ void store_kernel(const __grid_constant__ Descriptions<Entry> given, Entry* table) {
  const int i = threadIdx.x;
  if (i < given.count) table[i] = given.entries[i];
}

template <typename Run, typename Entry>
void store(const Run& run, const std::vector<Entry>& entries, Entry* table) {
  constexpr int kMost = Descriptions<Entry>::kMost;
  for (size_t begin = 0; begin < entries.size(); begin += kMost) {
    Descriptions<Entry> some;
    some.count = static_cast<int32_t>(entries.size() - begin < kMost ? entries.size() - begin : kMost);
    for (int i = 0; i < some.count; ++i) some.entries[i] = entries[begin + i];
    run(store_kernel<Entry>, dim3(1), 128, some, table + begin);
  }
}

// The sum of the values of the threads before this one. `shared` holds 32; total: of all threads.
__device__ __forceinline__ int32_t scan_block(int32_t value, int32_t* shared, int32_t* total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  int32_t sum = value;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int32_t before = __shfl_up_sync(kFullWarp, sum, distance);
    sum += lane >= distance ? before : 0;
  }
  __syncthreads();  // the last call's reads
  if (lane == kWarp - 1) shared[warp] = sum;
  __syncthreads();
  int32_t start = 0, all = 0;
  for (int i = 0; i < warps; ++i) {
    start += i < warp ? shared[i] : 0;
    all += shared[i];
  }
  *total = all;
  return start + sum - value;
}

template <int kDims>
struct Key {
  int32_t at[kDims];

  __device__ bool operator==(const Key& other) const {
    bool same = true;
#pragma unroll
    for (int i = 0; i < kDims; ++i) same = same && at[i] == other.at[i];
    return same;
  }

  __device__ uint32_t hash() const {
    uint32_t h = 0;
#pragma unroll
    for (int i = 0; i < kDims; ++i) {
      h = (h ^ static_cast<uint32_t>(at[i])) * 0x9e3779b1u;
      h ^= h >> 15;
    }
    return h;
  }
};

// One coordinate of corner r: r further than the remainder-0 point's, and dims + 1 back where its rank is high.
template <int kDims>
__device__ __forceinline__ int32_t corner_coordinate(int32_t base, uint32_t ranks, int i, int r) {
  return base + (static_cast<int>((ranks >> (4 * i)) & 15) <= kDims - r ? r : r - (kDims + 1));
}

template <int kDims>
__device__ __forceinline__ Key<kDims> key_of_entry(const int32_t* records, int32_t entry) {
  const int32_t* record = records + static_cast<int64_t>(entry / (kDims + 1)) * (kDims + 1);
  const uint32_t ranks = static_cast<uint32_t>(record[kDims]);
  Key<kDims> key;
#pragma unroll
  for (int i = 0; i < kDims; ++i) key.at[i] = corner_coordinate<kDims>(record[i], ranks, i, entry % (kDims + 1));
  return key;
}

// Where corner `r` of a point stands in weights and local.
__device__ __forceinline__ int64_t corner_at(int32_t dims, int32_t point, int32_t r) {
  return (static_cast<int64_t>(point / 16) * (dims + 1) + r) * 16 + point % 16;
}

// The pixel of a thread of a tile, or -1.
__device__ __forceinline__ int32_t pixel_of(int32_t height, int32_t width, int32_t tile, int32_t thread) {
  const int32_t across = (width + kTileSide - 1) / kTileSide;
  const int32_t y = tile / across * kTileSide + thread / kTileSide, x = tile % across * kTileSide + thread % kTileSide;
  return y < height && x < width ? y * width + x : -1;
}

template <int kDims>
__device__ __forceinline__ void load_features(const Lattice& lattice, int32_t point, float* features) {
  if (lattice.height == 0) {
#pragma unroll
    for (int i = 0; i < kDims; ++i) features[i] = lattice.features[static_cast<int64_t>(point) * kDims + i];
    return;
  }
  features[0] = static_cast<float>(point % lattice.width) / lattice.space_deviation;
  if constexpr (kDims >= 2) features[1] = static_cast<float>(point / lattice.width) / lattice.space_deviation;
#pragma unroll
  for (int i = 2; i < kDims; ++i) {
    features[i] = static_cast<float>(lattice.image[static_cast<int64_t>(point) * 3 + i - 2]) / lattice.colour_deviation;
  }
}

// The simplex that a point lies in (Adams et al. 2010, section 3): base, ranks, and the weights of its corners.
// Products are rounded before they are added to anything: contracted, positions move by 1e-5 of a cell, which mean
// field amplifies. Positions that float32 does not tell apart weigh NaN.
template <int kDims>
__device__ __forceinline__ void embed(const float* features, const float* scale, int32_t* base, uint32_t* ranks,
                                      float* weights) {
  constexpr int kCorners = kDims + 1;
  const float down = 1.0f / kCorners;
  float elevated[kCorners], sum = 0, reach = 0;
#pragma unroll
  for (int j = kDims; j > 0; --j) {
    const float scaled = __fmul_rn(features[j - 1], scale[j - 1]);
    const float lowered = __fmul_rn(static_cast<float>(j), scaled);
    elevated[j] = __fadd_rn(sum, -lowered);
    sum = __fadd_rn(sum, scaled);
    reach += fabsf(lowered);
  }
  elevated[0] = sum;
  float nearest[kCorners], difference[kCorners], total = 0;
#pragma unroll
  for (int i = 0; i < kCorners; ++i) {
    const float v = rintf(__fmul_rn(elevated[i], down));
    nearest[i] = __fmul_rn(v, static_cast<float>(kCorners));
    difference[i] = __fadd_rn(elevated[i], -nearest[i]);
    total += v;
  }
  const bool far = !(reach < 4e6f * kCorners);
  int rank[kCorners];
#pragma unroll
  for (int i = 0; i < kCorners; ++i) rank[i] = far ? 0 : static_cast<int>(total);
#pragma unroll
  for (int i = 0; i < kCorners; ++i) {
#pragma unroll
    for (int j = i + 1; j < kCorners; ++j) {
      const int less = difference[i] < difference[j];
      rank[i] += less;
      rank[j] += 1 - less;
    }
  }
  float sorted[kCorners];  // t of the coordinate of each rank
#pragma unroll
  for (int k = 0; k < kCorners; ++k) sorted[k] = 0;
  *ranks = 0;
#pragma unroll
  for (int i = 0; i < kCorners; ++i) {
    const int wrap = rank[i] < 0 ? kCorners : rank[i] > kDims ? -kCorners : 0;
    rank[i] += wrap;
    nearest[i] = __fadd_rn(nearest[i], static_cast<float>(wrap));
    const float t = __fmul_rn(__fadd_rn(elevated[i], -nearest[i]), down);
#pragma unroll
    for (int k = 0; k < kCorners; ++k) sorted[k] = rank[i] == k ? t : sorted[k];
    if (i < kDims) {
      base[i] = far ? 0 : static_cast<int32_t>(nearest[i]);
      *ranks |= static_cast<uint32_t>(rank[i] & 15) << (4 * i);
    }
  }
#pragma unroll
  for (int m = 0; m < kCorners; ++m) {
    weights[m] = m == 0 ? __fadd_rn(sorted[kDims], __fadd_rn(1.0f, -sorted[0]))
                        : __fadd_rn(sorted[kDims - m], -sorted[(kCorners - m) % kCorners]);
    if (far) weights[m] = NAN;
  }
}

// A block a tile: its points' simplices, the distinct vertices among their corners, and for each of these its points.
template <int kDims>
__global__ void __launch_bounds__(kTilePoints, 4) embed_kernel(const Lattice* __restrict__ lattices) {
  constexpr int kCorners = kDims + 1, kEntries = kTilePoints * kCorners, kSlots = kEntries <= 1024 ? 2048 : 4096;
  __shared__ int32_t base[kDims][kTilePoints], slots[kSlots], starts[kEntries + 1], scratch[kWarp];
  __shared__ uint32_t ranks[kTilePoints];
  __shared__ uint16_t list[kEntries];
  const Lattice& lattice = lattices[blockIdx.y];
  const int32_t tile = blockIdx.x, thread = threadIdx.x;
  if (tile >= lattice.tiles) return;
  const int32_t place = tile * kTilePoints + thread;  // among the points of every tile
  const int32_t point = lattice.height != 0 ? pixel_of(lattice.height, lattice.width, tile, thread)
                        : place < lattice.points ? place : -1;
  // the one that fills up is the first beyond the last, or the last tile's last, which is outside of such an image
  const bool fills = lattice.filled && (lattice.height != 0 ? place == lattice.tiles * kTilePoints - 1
                                                            : place == lattice.points);
  int32_t own_base[kDims], where[kCorners], total;
  uint32_t own_ranks = 0;
  float weights[kCorners];
#pragma unroll
  for (int r = 0; r < kCorners; ++r) weights[r] = 0, where[r] = 0;
#pragma unroll
  for (int i = 0; i < kDims; ++i) own_base[i] = 0;
  if (point >= 0) {
    float features[kDims];
    load_features<kDims>(lattice, point, features);
    embed<kDims>(features, lattice.scale, own_base, &own_ranks, weights);
  } else if (fills) {
    const float origin[kDims] = {};
    embed<kDims>(origin, lattice.scale, own_base, &own_ranks, weights);
#pragma unroll
    for (int r = 0; r < kCorners; ++r) weights[r] = 0;
  }
#pragma unroll
  for (int i = 0; i < kDims; ++i) {
    base[i][thread] = own_base[i];
    lattice.records[static_cast<int64_t>(place) * kCorners + i] = own_base[i];
  }
  ranks[thread] = own_ranks;
  lattice.records[static_cast<int64_t>(place) * kCorners + kDims] = static_cast<int32_t>(own_ranks);
  for (int i = thread; i < kSlots; i += kTilePoints) slots[i] = -1;
  for (int i = thread; i <= kEntries; i += kTilePoints) starts[i] = 0;
  __syncthreads();

  const auto key_of = [&](int32_t entry) {
    const int32_t from = entry / kCorners;
    Key<kDims> key;
#pragma unroll
    for (int i = 0; i < kDims; ++i) {
      key.at[i] = corner_coordinate<kDims>(base[i][from], ranks[from], i, entry % kCorners);
    }
    return key;
  };
  if (point >= 0 || fills) {
#pragma unroll
    for (int r = 0; r < kCorners; ++r) {
      const int32_t entry = thread * kCorners + r;
      const Key<kDims> key = key_of(entry);
      uint32_t slot = key.hash() & (kSlots - 1);
      while (true) {
        const int32_t resident = atomicCAS(&slots[slot], -1, entry);
        if (resident == -1) break;
        if (key == key_of(resident)) {
          atomicMin(&slots[slot], entry);
          break;
        }
        slot = (slot + 1) & (kSlots - 1);
      }
      where[r] = slot;
    }
  }
  __syncthreads();
  uint32_t is_first = 0;
  int32_t firsts = 0;
#pragma unroll
  for (int r = 0; r < kCorners; ++r) {
    const bool here = (point >= 0 || fills) && slots[where[r]] == thread * kCorners + r;
    is_first |= static_cast<uint32_t>(here) << r, firsts += here;
  }
  int32_t next = scan_block(firsts, scratch, &total);  // all have read their slots
  const int64_t first_run = static_cast<int64_t>(tile) * kEntries;
#pragma unroll
  for (int r = 0; r < kCorners; ++r) {
    if (is_first >> r & 1) {
      lattice.entries[first_run + next] = static_cast<uint16_t>(thread * kCorners + r);
      slots[where[r]] = next++;
    }
  }
  if (thread == 0) lattice.runs[tile] = total;
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kCorners; ++r) {
    where[r] = point >= 0 ? slots[where[r]] : 0;  // from here on the local vertex
    if (point >= 0) atomicAdd(&starts[where[r]], 1);
    if (place < lattice.padded) {
      const int64_t at = corner_at(kDims, place, r);
      lattice.local[at] = static_cast<uint16_t>(where[r]);
      lattice.weights[at] = weights[r];
    }
  }
  __syncthreads();
  int32_t counts[kCorners], sum = 0;
#pragma unroll
  for (int r = 0; r < kCorners; ++r) sum += counts[r] = starts[thread * kCorners + r];
  int32_t start = scan_block(sum, scratch, &sum);
#pragma unroll
  for (int r = 0; r < kCorners; ++r) {
    starts[thread * kCorners + r] = slots[thread * kCorners + r] = start;
    start += counts[r];
  }
  if (thread == 0) starts[kEntries] = sum;
  __syncthreads();
  if (point >= 0) {
#pragma unroll
    for (int r = 0; r < kCorners; ++r) {
      list[atomicAdd(&slots[where[r]], 1)] = static_cast<uint16_t>(r * kTilePoints + thread);
    }
  }
  __syncthreads();
  if (point >= 0) {
#pragma unroll
    for (int r = 0; r < kCorners; ++r) {
      const int32_t self = r * kTilePoints + thread, begin = starts[where[r]], end = starts[where[r] + 1];
      int32_t rank = 0;
      for (int32_t k = begin; k < end; ++k) rank += list[k] < self;
      lattice.order[first_run + begin + rank] = static_cast<uint16_t>(self);
    }
  }
  for (int i = thread; i <= total; i += kTilePoints) {
    lattice.starts[first_run + tile + i] = static_cast<uint16_t>(starts[i]);
  }
}

__global__ void __launch_bounds__(kTilePoints) clear_kernel(const Lattice* __restrict__ lattices) {
  const Lattice& lattice = lattices[blockIdx.y];
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i <= lattice.mask; i += step) {
    lattice.slots[i] = -1;
  }
}

// Calls f(run, entry) for the runs of this block's tile.
template <typename F>
__device__ __forceinline__ void over_runs(const Lattice& lattice, F&& f) {
  if (static_cast<int32_t>(blockIdx.x) >= lattice.tiles) return;
  const int32_t first = blockIdx.x * kTilePoints * (lattice.dims + 1), runs = lattice.runs[blockIdx.x];
  for (int32_t i = threadIdx.x; i < runs; i += blockDim.x) f(first + i, first + lattice.entries[first + i]);
}

// Every run's vertex into the hash table; of the entries with one key the first stays.
template <int kDims>
__global__ void __launch_bounds__(kTilePoints) insert_kernel(const Lattice* __restrict__ lattices) {
  const Lattice& lattice = lattices[blockIdx.y];
  over_runs(lattice, [&](int32_t run, int32_t entry) {
    const Key<kDims> key = key_of_entry<kDims>(lattice.records, entry);
    uint32_t slot = key.hash() & lattice.mask;
    while (true) {
      const int32_t resident = atomicCAS(&lattice.slots[slot], -1, entry);
      if (resident == -1) break;
      if (key == key_of_entry<kDims>(lattice.records, resident)) {
        atomicMin(&lattice.slots[slot], entry);
        break;
      }
      slot = (slot + 1) & lattice.mask;
    }
    lattice.vertex[run] = static_cast<int32_t>(slot);
  });
}

// tile_first: how many vertices a tile is the first to touch.
__global__ void __launch_bounds__(kTilePoints) count_kernel(const Lattice* __restrict__ lattices) {
  __shared__ int32_t shared[kWarp];
  const Lattice& lattice = lattices[blockIdx.y];
  if (static_cast<int32_t>(blockIdx.x) >= lattice.tiles) return;
  int32_t count = 0;
  over_runs(lattice, [&](int32_t run, int32_t entry) { count += lattice.slots[lattice.vertex[run]] == entry; });
  count = block_reduce(count, Plus(), shared);
  if (threadIdx.x == 0) lattice.tile_first[blockIdx.x] = count;
}

// A block a lattice: tile_first (and the number of vertices), or tile_rows, become sums over the tiles before.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(const Lattice* __restrict__ lattices, bool rows) {
  __shared__ int32_t shared[kWarp];
  const Lattice& lattice = lattices[blockIdx.x];
  int32_t *counts = rows ? lattice.tile_rows : lattice.tile_first, before = 0;
  for (int32_t begin = 0; begin < lattice.tiles; begin += kScanThreads) {
    const int32_t i = begin + static_cast<int32_t>(threadIdx.x);
    int32_t total;
    const int32_t sum = scan_block(i < lattice.tiles ? counts[i] : 0, shared, &total);
    if (i < lattice.tiles) counts[i] = before + sum;
    before += total;
  }
  if (threadIdx.x != 0) return;
  counts[lattice.tiles] = before;
  if (rows) {
    lattice.rows[0] = 0;
    lattice.rows[lattice.status[kVertices] + 1] = before;
  } else {
    lattice.status[kVertices] = min(before, lattice.capacity);
    lattice.status[kOverflow] = before > lattice.capacity;
  }
}

// Numbers the vertices that a tile is the first to touch.
__global__ void __launch_bounds__(kTilePoints) number_kernel(const Lattice* __restrict__ lattices) {
  __shared__ int32_t shared[kWarp];
  const Lattice& lattice = lattices[blockIdx.y];
  if (static_cast<int32_t>(blockIdx.x) >= lattice.tiles) return;
  const int32_t first = blockIdx.x * kTilePoints * (lattice.dims + 1), runs = lattice.runs[blockIdx.x];
  const int64_t stride = lattice.capacity + int64_t{1};
  int32_t next = 1 + lattice.tile_first[blockIdx.x];
  for (int32_t begin = 0; begin < runs; begin += kTilePoints) {
    const int32_t i = begin + static_cast<int32_t>(threadIdx.x);
    int32_t entry = -1, slot = 0, total;
    if (i < runs) entry = first + lattice.entries[first + i], slot = lattice.vertex[first + i];
    const bool is_first = i < runs && lattice.slots[slot] == entry;
    const int32_t v = next + scan_block(is_first, shared, &total);
    next += total;
    if (!is_first) continue;
    lattice.number[slot] = v <= lattice.capacity ? v : 0;
    if (v > lattice.capacity) continue;
    lattice.first[v] = entry, lattice.count[v] = 0;
    for (int32_t axis = 0; axis <= lattice.dims; ++axis) {
      lattice.neighbours[2 * (axis * stride + v)] = lattice.neighbours[2 * (axis * stride + v) + 1] = 0;
    }
  }
  if (blockIdx.x == 0 && static_cast<int32_t>(threadIdx.x) <= lattice.dims) {
    lattice.neighbours[2 * threadIdx.x * stride] = lattice.neighbours[2 * threadIdx.x * stride + 1] = 0;
  }
}

// Every run's vertex, and how many runs a vertex has.
__global__ void __launch_bounds__(kTilePoints) link_kernel(const Lattice* __restrict__ lattices) {
  const Lattice& lattice = lattices[blockIdx.y];
  over_runs(lattice, [&](int32_t run, int32_t) {
    const int32_t v = lattice.number[lattice.vertex[run]];
    lattice.vertex[run] = v;
    if (v != 0) atomicAdd(&lattice.count[v], 1);
  });
}

// The neighbour after a vertex along an axis lies one further in every coordinate and dims + 1 back in the axis'.
template <int kDims>
__global__ void __launch_bounds__(kTilePoints) neighbour_kernel(const Lattice* __restrict__ lattices) {
  const Lattice& lattice = lattices[blockIdx.y];
  const int32_t vertices = lattice.status[kVertices];
  const int64_t stride = lattice.capacity + int64_t{1}, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < vertices; i += step) {
    const auto v = static_cast<int32_t>(i + 1);
    const Key<kDims> own = key_of_entry<kDims>(lattice.records, lattice.first[v]);
    for (int axis = 0; axis <= kDims; ++axis) {
      Key<kDims> key = own;
#pragma unroll
      for (int k = 0; k < kDims; ++k) key.at[k] += k == axis ? -kDims : 1;
      uint32_t slot = key.hash() & lattice.mask;
      int32_t after = 0;
      while (true) {
        const int32_t resident = lattice.slots[slot];
        if (resident == -1) break;
        if (key == key_of_entry<kDims>(lattice.records, resident)) {
          after = lattice.number[slot];
          break;
        }
        slot = (slot + 1) & lattice.mask;
      }
      if (after == 0) continue;
      lattice.neighbours[2 * (axis * stride + v) + 1] = after;
      lattice.neighbours[2 * (axis * stride + after)] = v;
    }
  }
}

// The vertices that a tile was the first to touch are numbered in a row: [begin, end).
__device__ __forceinline__ void own_vertices(const Lattice& lattice, int32_t* begin, int32_t* end) {
  *begin = min(lattice.tile_first[blockIdx.x], lattice.capacity) + 1;
  *end = min(lattice.tile_first[blockIdx.x + 1], lattice.capacity) + 1;
}

__global__ void __launch_bounds__(kTilePoints) count_rows_kernel(const Lattice* __restrict__ lattices) {
  __shared__ int32_t shared[kWarp];
  const Lattice& lattice = lattices[blockIdx.y];
  if (static_cast<int32_t>(blockIdx.x) >= lattice.tiles) return;
  int32_t begin, end, count = 0;
  own_vertices(lattice, &begin, &end);
  for (int32_t v = begin + static_cast<int32_t>(threadIdx.x); v < end; v += kTilePoints) count += lattice.count[v];
  count = block_reduce(count, Plus(), shared);
  if (threadIdx.x == 0) lattice.tile_rows[blockIdx.x] = count;
}

__global__ void __launch_bounds__(kTilePoints) rows_kernel(const Lattice* __restrict__ lattices) {
  __shared__ int32_t shared[kWarp];
  const Lattice& lattice = lattices[blockIdx.y];
  if (static_cast<int32_t>(blockIdx.x) >= lattice.tiles) return;
  int32_t begin, end, next = lattice.tile_rows[blockIdx.x];
  own_vertices(lattice, &begin, &end);
  for (; begin < end; begin += kTilePoints) {
    const int32_t v = begin + static_cast<int32_t>(threadIdx.x);
    int32_t total;
    const int32_t row = next + scan_block(v < end ? lattice.count[v] : 0, shared, &total);
    next += total;
    if (v < end) lattice.rows[v] = lattice.cursor[v] = row;
  }
}

__global__ void __launch_bounds__(kTilePoints) list_kernel(const Lattice* __restrict__ lattices) {
  const Lattice& lattice = lattices[blockIdx.y];
  over_runs(lattice, [&](int32_t run, int32_t) {
    const int32_t v = lattice.vertex[run];
    if (v != 0) lattice.list[atomicAdd(&lattice.cursor[v], 1)] = run;
  });
}

// A run's row: its vertex' first, and the number of its runs before this one.
__global__ void __launch_bounds__(kTilePoints) row_kernel(const Lattice* __restrict__ lattices) {
  const Lattice& lattice = lattices[blockIdx.y];
  over_runs(lattice, [&](int32_t run, int32_t) {
    const int32_t v = lattice.vertex[run];
    int32_t row = -1;
    if (v != 0) {
      const int32_t begin = lattice.rows[v], end = lattice.rows[v + 1];
      row = begin;
      for (int32_t k = begin; k < end; ++k) row += lattice.list[k] < run;
    }
    lattice.row[run] = row;
  });
}

// The vertices of every corner, as the CPU's lattice has them.
__global__ void __launch_bounds__(kTilePoints) corners_kernel(const Lattice* __restrict__ lattice,
                                                              int32_t* __restrict__ corners) {
  const int32_t point = blockIdx.x * kTilePoints + threadIdx.x, dims = lattice->dims;
  if (point >= lattice->padded) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTilePoints * (dims + 1);
  for (int32_t r = 0; r <= dims; ++r) {
    const int64_t at = corner_at(dims, point, r);
    corners[at] = point < lattice->points ? lattice->vertex[first + lattice->local[at]] : 0;
  }
}

// Blocks that stride over what the host does not know the number of: enough for half a vertex a point in four steps.
inline unsigned striding_blocks(int64_t points, int64_t vectors) {
  const int64_t blocks = (points * vectors + kTilePoints * 8 - 1) / (kTilePoints * 8);
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > 1024 ? 1024 : blocks);
}

// Builds `count` lattices of one dimension; `tiles` and `points`: the most that one of them has.
template <int kDims, typename Run>
void build(const Run& run, const Lattice* lattices, unsigned count, unsigned tiles, int64_t points) {
  const dim3 by_tile(tiles, count), striding(striding_blocks(points, 1), count);
  run(embed_kernel<kDims>, by_tile, kTilePoints, lattices);
  run(clear_kernel, dim3(striding_blocks(points, 4), count), kTilePoints, lattices);
  run(insert_kernel<kDims>, by_tile, kTilePoints, lattices);
  run(count_kernel, by_tile, kTilePoints, lattices);
  run(scan_kernel, dim3(count), kScanThreads, lattices, false);
  run(number_kernel, by_tile, kTilePoints, lattices);
  run(link_kernel, by_tile, kTilePoints, lattices);
  run(neighbour_kernel<kDims>, striding, kTilePoints, lattices);
  run(count_rows_kernel, by_tile, kTilePoints, lattices);
  run(scan_kernel, dim3(count), kScanThreads, lattices, true);
  run(rows_kernel, by_tile, kTilePoints, lattices);
  run(list_kernel, by_tile, kTilePoints, lattices);
  run(row_kernel, by_tile, kTilePoints, lattices);
}

template <typename Run>
void build_of_dims(const Run& run, const Lattice* lattices, int32_t dims, unsigned count, unsigned tiles,
                   int64_t points) {
  switch (dims) {
    case 1: return build<1>(run, lattices, count, tiles, points);
    case 2: return build<2>(run, lattices, count, tiles, points);
    case 3: return build<3>(run, lattices, count, tiles, points);
    case 4: return build<4>(run, lattices, count, tiles, points);
    case 5: return build<5>(run, lattices, count, tiles, points);
    case 6: return build<6>(run, lattices, count, tiles, points);
    case 7: return build<7>(run, lattices, count, tiles, points);
    default: return build<8>(run, lattices, count, tiles, points);
  }
}

// Values over the vertices of a lattice. partial: [row][channels], what the tiles have summed; first, second:
// [vertex][channels], between which blurs go back and forth, row 0 unused. Where there is an even number of blurs,
// second is partial: that has been read by then.
struct Field {
  const float* input;           // [point][channels], or null for ones
  float* output;                // likewise
  const float *before, *after;  // [point]: factors of what is splat and of what is sliced, or null
  float *partial, *first, *second;
  int32_t lattice, channels;
  float strength;  // what the filtered values are multiplied with in the energy
};

inline void take_field(Field& field, const Lattice& lattice, Arena& arena) {
  const int64_t vertices = lattice.capacity + int64_t{1}, channels = field.channels;
  const int64_t entries = int64_t{lattice.tiles} * kTilePoints * (lattice.dims + 1);
  arena.take(field.partial, std::max(entries, vertices) * channels);
  arena.take(field.first, vertices * channels);
  if (lattice.dims % 2 == 0) {
    arena.take(field.second, vertices * channels);
  } else {
    field.second = field.partial;
  }
}

// Where the blurred values stand.
__device__ __forceinline__ float* blurred(const Field& field, int32_t dims) {
  return dims % 2 == 0 ? field.second : field.first;
}

// What no thread of the kernel writes: says so, since pointers that come out of descriptions could be any.
template <int kVec>
__device__ __forceinline__ Pack<float, kVec> load(const Pack<float, kVec>* from) {
  Pack<float, kVec> value;
  if constexpr (kVec == 4) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(from));
    value.at[0] = four.x, value.at[1] = four.y, value.at[2] = four.z, value.at[3] = four.w;
  } else {
    static_assert(kVec == 1);
    value.at[0] = __ldg(from->at);
  }
  return value;
}

// The [vertex from 1][vector] that a thread of a striding grid takes: one division, not one for each.
struct Stride {
  int32_t vertex, vector, vertices, vectors;  // the current one; what a step adds

  __device__ explicit Stride(int32_t count) {
    const uint32_t step = gridDim.x * blockDim.x, begin = blockIdx.x * blockDim.x + threadIdx.x;
    vertex = static_cast<int32_t>(1 + begin / count), vector = static_cast<int32_t>(begin % count);
    vertices = static_cast<int32_t>(step / count), vectors = static_cast<int32_t>(step % count);
  }

  __device__ void next(int32_t count) {
    vertex += vertices, vector += vectors;
    if (vector >= count) vector -= count, ++vertex;
  }
};

template <int kVec>
__device__ __forceinline__ void add_product(Pack<float, kVec>& sum, float a, const Pack<float, kVec>& b) {
#pragma unroll
  for (int c = 0; c < kVec; ++c) sum.at[c] += a * b.at[c];
}

__device__ __forceinline__ float slice_scale(int32_t dims) {
  return 1.0f / (1.0f + 1.0f / static_cast<float>(1 << dims));
}

// partial(run) = sum of weight * input over the run's points.
template <int kVec>
__global__ void __launch_bounds__(kTilePoints, 4) splat_kernel(const Lattice* __restrict__ lattices,
                                                               const Field* __restrict__ fields) {
  using Value = Pack<float, kVec>;
  const Field& field = fields[blockIdx.y];
  const Lattice& lattice = lattices[field.lattice];
  const int32_t tile = blockIdx.x, dims = lattice.dims;
  if (tile >= lattice.tiles) return;
  const int64_t first = static_cast<int64_t>(tile) * kTilePoints * (dims + 1);
  const int32_t vectors = field.channels / kVec, items = __ldg(lattice.runs + tile) * vectors;
  const uint16_t *starts = lattice.starts + first + tile, *order = lattice.order + first;
  for (int32_t i = threadIdx.x; i < items; i += kTilePoints) {
    const int32_t run = i / vectors, k = i % vectors, row = __ldg(lattice.row + first + run);
    const int32_t end = __ldg(starts + run + 1);
    if (row < 0) continue;
    Value sum{};
    for (int32_t j = __ldg(starts + run); j < end; ++j) {
      const int32_t entry = __ldg(order + j), point = tile * kTilePoints + entry % kTilePoints;
      float weight = __ldg(lattice.weights + corner_at(dims, point, entry / kTilePoints));
      if (field.before != nullptr) weight *= __ldg(field.before + point);
      Value value;
      if (field.input != nullptr) {
        value = load(reinterpret_cast<const Value*>(field.input) + static_cast<int64_t>(point) * vectors + k);
      } else {
#pragma unroll
        for (int c = 0; c < kVec; ++c) value.at[c] = 1;
      }
      add_product(sum, weight, value);
    }
    reinterpret_cast<Value*>(field.partial)[static_cast<int64_t>(row) * vectors + k] = sum;
  }
}

// first(vertex) = sum of its rows, tiles ascending.
template <int kVec>
__global__ void __launch_bounds__(kTilePoints) gather_kernel(const Lattice* __restrict__ lattices,
                                                             const Field* __restrict__ fields) {
  using Value = Pack<float, kVec>;
  const Field& field = fields[blockIdx.y];
  const Lattice& lattice = lattices[field.lattice];
  const int32_t vectors = field.channels / kVec, vertices = __ldg(lattice.status + kVertices);
  const auto* partial = reinterpret_cast<const Value*>(field.partial);
  for (Stride at(vectors); at.vertex <= vertices; at.next(vectors)) {
    const int32_t end = __ldg(lattice.rows + at.vertex + 1);
    Value sum{};
    for (int32_t row = __ldg(lattice.rows + at.vertex); row < end; ++row) {
      add_product(sum, 1.0f, load(partial + static_cast<int64_t>(row) * vectors + at.vector));
    }
    reinterpret_cast<Value*>(field.first)[static_cast<int64_t>(at.vertex) * vectors + at.vector] = sum;
  }
}

// One step of the blur, along axis `step` or, transposed, dims - step: out = in + (before + after) / 2.
template <int kVec>
__global__ void __launch_bounds__(kTilePoints) blur_kernel(const Lattice* __restrict__ lattices,
                                                           const Field* __restrict__ fields, int32_t step,
                                                           bool transposed) {
  using Value = Pack<float, kVec>;
  const Field& field = fields[blockIdx.y];
  const Lattice& lattice = lattices[field.lattice];
  if (step > lattice.dims) return;
  const int32_t vectors = field.channels / kVec, axis = transposed ? lattice.dims - step : step;
  const auto* in = reinterpret_cast<const Value*>(step % 2 == 0 ? field.first : field.second);
  auto* out = reinterpret_cast<Value*>(step % 2 == 0 ? field.second : field.first);
  const int32_t* pairs = lattice.neighbours + 2 * (axis * (lattice.capacity + int64_t{1}));
  const int32_t vertices = __ldg(lattice.status + kVertices);
  for (Stride at(vectors); at.vertex <= vertices; at.next(vectors)) {
    const int2 pair = __ldg(reinterpret_cast<const int2*>(pairs) + at.vertex);
    const int64_t place = static_cast<int64_t>(at.vertex) * vectors + at.vector;
    Value result = load(in + place), before{}, after{};
    if (pair.x != 0) before = load(in + static_cast<int64_t>(pair.x) * vectors + at.vector);
    if (pair.y != 0) after = load(in + static_cast<int64_t>(pair.y) * vectors + at.vector);
#pragma unroll
    for (int c = 0; c < kVec; ++c) result.at[c] += 0.5f * (before.at[c] + after.at[c]);
    out[place] = result;
  }
}

// What becomes of a sliced value x: x, 1 / sqrt(x + 1e-20), 1 / (x + 1e-20), or output + strength * x.
enum Slice : int32_t { kPlain, kRoot, kInverse, kAdd };
enum Normalization { kSymmetric, kAfter, kBefore, kNone };

template <int kVec>
__global__ void __launch_bounds__(kTilePoints, 4) slice_kernel(const Lattice* __restrict__ lattices,
                                                               const Field* __restrict__ fields, Slice how) {
  using Value = Pack<float, kVec>;
  const Field& field = fields[blockIdx.y];
  const Lattice& lattice = lattices[field.lattice];
  const int32_t tile = blockIdx.x, dims = lattice.dims, vectors = field.channels / kVec;
  if (tile >= lattice.tiles) return;
  const auto* values = reinterpret_cast<const Value*>(blurred(field, dims));
  const int32_t* vertex = lattice.vertex + static_cast<int64_t>(tile) * kTilePoints * (dims + 1);
  const float alpha = slice_scale(dims);
  for (int32_t i = threadIdx.x; i < kTilePoints * vectors; i += kTilePoints) {
    const int32_t in_tile = i / vectors, k = i % vectors, point = tile * kTilePoints + in_tile;
    const bool inside = lattice.height != 0 ? pixel_of(lattice.height, lattice.width, tile, in_tile) >= 0
                                            : point < lattice.points;
    if (!inside && lattice.height == 0) continue;
    Value sum{};
    for (int32_t r = 0; inside && r <= dims; ++r) {
      const int64_t at = corner_at(dims, point, r);
      const int32_t v = __ldg(vertex + __ldg(lattice.local + at));
      const float weight = __ldg(lattice.weights + at) * alpha;
      if (v != 0) add_product(sum, weight, load(values + static_cast<int64_t>(v) * vectors + k));
    }
    Value& result = reinterpret_cast<Value*>(field.output)[static_cast<int64_t>(point) * vectors + k];
    const float after = field.after != nullptr ? __ldg(field.after + point) : 1.0f;
#pragma unroll
    for (int c = 0; c < kVec; ++c) {
      float& x = sum.at[c];
      x *= after;
      if (how == kRoot) x = 1.0f / sqrtf(x + 1e-20f);
      if (how == kInverse) x = 1.0f / (x + 1e-20f);
      if (how == kAdd) x = result.at[c] + field.strength * x;
    }
    result = sum;
  }
}

// What was splat, blurred along every axis.
template <int kVec, typename Run>
void blur(const Run& run, const Lattice* lattices, const Field* fields, unsigned count, int64_t points, int64_t vectors,
          int32_t dims, bool transposed) {
  const dim3 striding(striding_blocks(points, vectors), count);
  run(gather_kernel<kVec>, striding, kTilePoints, lattices, fields);
  for (int32_t step = 0; step <= dims; ++step) {
    run(blur_kernel<kVec>, striding, kTilePoints, lattices, fields, step, transposed);
  }
}

// output = filter(input); `tiles`, `points` and `dims`: the most that one of the fields' lattices has.
template <int kVec, typename Run>
void filter(const Run& run, const Lattice* lattices, const Field* fields, unsigned count, unsigned tiles,
            int64_t points, int32_t channels, int32_t dims, bool transposed, Slice how) {
  run(splat_kernel<kVec>, dim3(tiles, count), kTilePoints, lattices, fields);
  blur<kVec>(run, lattices, fields, count, points, channels / kVec, dims, transposed);
  run(slice_kernel<kVec>, dim3(tiles, count), kTilePoints, lattices, fields, how);
}

}  // namespace ribfast::cuda
