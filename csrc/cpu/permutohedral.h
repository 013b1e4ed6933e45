// Building a permutohedral lattice: vertices in a hash table, corners and neighbours as indices. Free of torch but for
// its threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "kernels.h"

namespace ribfast::cpu {

// Memory whose contents are not set.
template <typename T>
struct Buffer {
  std::unique_ptr<T[]> memory;
  int64_t size = 0;

  T* get(int64_t wanted) {
    if (wanted > size) memory.reset(new T[wanted]), size = wanted;
    return memory.get();
  }
  T* data() const { return memory.get(); }
};

// Vertices by key, open addressing. Key: uint64_t, or unsigned __int128 where coordinates need more room. A look-up
// mostly waits for memory: ask for the slot early with prefetch().
template <typename Key>
class VertexTable {
 public:
  explicit VertexTable(int64_t expected) { resize(expected); }

  void prefetch(Key key) const { __builtin_prefetch(&slots_[slot(key)]); }

  int32_t insert(Key key) {
    size_t at = slot(key);
    while (slots_[at].id != 0) {
      if (slots_[at].key == key) return slots_[at].id;
      at = (at + 1) & mask_;
    }
    vertices_.push_back(key);
    const auto id = static_cast<int32_t>(vertices_.size() - 1);
    slots_[at] = {key, id};
    if (vertices_.size() * 2 > mask_) resize(static_cast<int64_t>(vertices_.size()) * 2);
    return id;
  }

  int32_t find(Key key) const {
    size_t at = slot(key);
    while (slots_[at].id != 0 && slots_[at].key != key) at = (at + 1) & mask_;
    return slots_[at].id;
  }

  const std::vector<Key>& vertices() const { return vertices_; }  // vertices()[0] is none

 private:
  struct Slot {
    Key key;
    int32_t id;
  };

  size_t slot(Key key) const {
    uint64_t folded = static_cast<uint64_t>(key);
    if constexpr (sizeof(Key) > 8) folded ^= static_cast<uint64_t>(key >> 64) * 0x9e3779b97f4a7c15ull;
    return (folded * 0x9e3779b97f4a7c15ull) >> shift_;
  }

  void resize(int64_t expected) {
    int bits = 10;
    while ((int64_t{1} << bits) < 2 * expected) ++bits;
    shift_ = 64 - bits, mask_ = (size_t{1} << bits) - 1;
    slots_.assign(mask_ + 1, Slot{});
    for (size_t id = 1; id < vertices_.size(); ++id) {
      size_t at = slot(vertices_[id]);
      while (slots_[at].id != 0) at = (at + 1) & mask_;
      slots_[at] = {vertices_[id], static_cast<int32_t>(id)};
    }
  }

  std::vector<Key> vertices_ = std::vector<Key>(1);
  std::vector<Slot> slots_;
  size_t mask_ = 0;
  int shift_ = 0;
};

struct Permutohedral {
  int64_t points = 0;
  int32_t dims = 0, vertices = 0;  // vertices: with the absent one
  Buffer<int32_t> corners;         // [tile][corner][kTile]
  Buffer<float> weights;           // likewise
  std::vector<int32_t> neighbours;  // [axis][vertex][2]

  // features: [dim][points], finite. `fast` kernels may contract multiplications and additions; the default tier's do not.
  Permutohedral(const float* features, int64_t points_, int32_t dims_, const Kernels& kernels)
      : points(points_), dims(dims_) {
    const int64_t total = tiles_of(points) * kTile * (dims + 1);
    if (total >= (int64_t{1} << 31)) throw std::length_error("fewer points: corners are numbered in 31 bits");
    Buffer<int32_t> base;
    Buffer<uint8_t> rank;
    EmbedJob job{features, points, 0, 0, dims, {}, base.get(total), rank.get(total), weights.get(total)};
    const auto spread = static_cast<float>(std::sqrt(2.0 / 3.0) * (dims + 1));  // rounded, as pydensecrf's is
    for (int32_t i = 0; i < dims; ++i) {
      job.scale[i] = static_cast<float>(1.0 / std::sqrt((i + 2.0) * (i + 1.0)) * spread);
    }
    check_range(features, job);
    at::parallel_for(0, tiles_of(points), 256, [&](int64_t begin, int64_t end) {
      EmbedJob part = job;
      part.begin = begin, part.end = end;
      kernels.embed(part);
    });
    corners.get(total);
    connect(job);
  }

 private:
  int32_t lowest_[kMaxDims] = {};
  int field_[kMaxDims + 1] = {};  // where each coordinate starts in a key, and the bits of all

  void check_range(const float* features, const EmbedJob& job) const {
    double reach = 0;
    for (int32_t i = 0; i < dims; ++i) {
      float largest = 0;
      for (int64_t p = 0; p < points; ++p) largest = std::max(largest, std::abs(features[i * points + p]));
      reach += largest * job.scale[i] * (i + 1.0);
    }
    if (!(reach < 4e6 * (dims + 1))) {
      throw std::range_error("larger standard deviations: positions on the lattice exceed what float32 tells apart");
    }
  }

  void connect(const EmbedJob& job) {
    for (int32_t i = 0; i < dims; ++i) {
      int32_t low = job.base[i * kTile], high = low;  // of the padding too, which only widens them
      for (int64_t tile = 0; tile < tiles_of(points); ++tile) {
        const int32_t* from = job.base + (tile * dims + i) * kTile;
        for (int k = 0; k < kTile; ++k) low = std::min(low, from[k]), high = std::max(high, from[k]);
      }
      lowest_[i] = low - 2 * (dims + 1);
      const int64_t range = int64_t{high} - low + 4 * (dims + 1) + 1;
      int bits = 1;
      while ((int64_t{1} << bits) < range) ++bits;
      field_[i + 1] = field_[i] + bits;
    }
    if (field_[dims] <= 64) {
      connect_with<uint64_t>(job);
    } else if (field_[dims] <= 128) {
      connect_with<unsigned __int128>(job);
    } else {
      throw std::range_error("larger standard deviations: the lattice's coordinates exceed 128 bits");
    }
  }

  template <typename Key>
  void connect_with(const EmbedJob& job) {
    const int32_t count = dims + 1;
    Key ones = 0, step[kMaxDims + 1] = {};  // a move by one in every coordinate; by dims + 1 along an axis
    for (int32_t i = 0; i < dims; ++i) {
      ones += Key{1} << field_[i];
      step[i] = static_cast<Key>(count) << field_[i];
    }
    VertexTable<Key> table(std::min<int64_t>(points, int64_t{1} << 17));
    Key keys_of_tile[kMaxDims + 1][kTile], previous[kMaxDims + 1] = {};
    int32_t ids[kMaxDims + 1] = {};
    for (int64_t tile = 0; tile < tiles_of(points); ++tile) {
      const int64_t used = std::min<int64_t>(kTile, points - tile * kTile);
      const int32_t* base = job.base + tile * dims * kTile;
      const uint8_t* rank = job.rank + tile * count * kTile;
      int32_t* corner = corners.data() + tile * count * kTile;
      for (int64_t lane = 0; lane < used; ++lane) {
        Key key = 0;
        for (int32_t i = 0; i < dims; ++i) {
          key += static_cast<Key>(static_cast<uint32_t>(base[i * kTile + lane] - lowest_[i])) << field_[i];
        }
        Key step_of_rank[kMaxDims + 1];
        for (int32_t i = 0; i < count; ++i) step_of_rank[rank[i * kTile + lane]] = step[i];
        // corner r lies one further in every coordinate than corner r - 1, and dims + 1 back where the rank is
        // dims + 1 - r
        for (int32_t r = 0; r < count; ++r) {
          if (r > 0) key += ones - step_of_rank[count - r];
          keys_of_tile[r][lane] = key;
          table.prefetch(key);
        }
      }
      for (int64_t lane = 0; lane < used; ++lane) {
        for (int32_t r = 0; r < count; ++r) {
          const Key key = keys_of_tile[r][lane];
          if (key != previous[r] || ids[r] == 0) previous[r] = key, ids[r] = table.insert(key);
          corner[r * kTile + lane] = ids[r];
        }
      }
      for (int64_t lane = used; lane < kTile; ++lane) {
        for (int32_t r = 0; r < count; ++r) corner[r * kTile + lane] = 0;
      }
    }
    const std::vector<Key>& keys = table.vertices();
    vertices = static_cast<int32_t>(keys.size());
    neighbours.assign(static_cast<size_t>(count) * vertices * 2, 0);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t axis = begin; axis < end; ++axis) {
        int32_t* pairs = neighbours.data() + axis * vertices * 2;
        constexpr int32_t kAhead = 16;
        for (int32_t v = 1; v < vertices; ++v) {
          if (v + kAhead < vertices) table.prefetch(keys[v + kAhead] + ones - step[axis]);
          const int32_t after = table.find(keys[v] + ones - step[axis]);
          if (after != 0) pairs[2 * v + 1] = after, pairs[2 * after] = v;
        }
      }
    });
  }
};

}  // namespace ribfast::cpu
