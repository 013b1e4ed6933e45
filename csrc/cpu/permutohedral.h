// Building a permutohedral lattice: vertices in a hash table, corners as indices, lines of neighbours for the blur.
// Free of torch but for its threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "buffer.h"
#include "kernels.h"

namespace ribfast::cpu {

// What the kernels need of a lattice. The arrays belong to somebody else.
struct LatticeArrays {
  int64_t points;
  int32_t dims, vertices;  // vertices: with the absent one
  const int32_t* corners;
  const float* weights;
  const int32_t* links;     // lines of neighbours, those of axis a and segment s at [segments[i], segments[i + 1]) with
  const int64_t* segments;  // i = a * kSegments + s; or both null, and
  const int32_t* pairs;     // for one channel alone: [axis][before, after][stride]
  const int32_t* touched;   // LatticeView's, or null

  int64_t tiles() const { return tiles_of(points); }
  int32_t spare() const { return vertices; }  // the vertex that closing zeros are written to
  int64_t stride() const { return (int64_t{vertices} + 1 + kTile - 1) / kTile * kTile; }
};

// Vertices by key (VertexSlots in lattice.h).
template <int kWords>
class VertexTable {
 public:
  struct Key {
    uint64_t word[kWords];
    bool operator==(const Key& other) const {
      for (int i = 0; i < kWords; ++i) {
        if (word[i] != other.word[i]) return false;
      }
      return true;
    }
  };

  explicit VertexTable(int64_t expected) { resize(expected); }
  VertexTable(VertexTable&&) = default;

  int32_t insert(const Key& key) {
    const uint64_t h = hash(key);
    size_t at = h >> shift_;
    for (; slots_[at] >> 32 != 0; at = (at + 1) & mask_) {
      if (same(slots_[at], h, key)) return static_cast<int32_t>(slots_[at] >> 32);
    }
    if (keys_.size() >= static_cast<size_t>(kMostVertices)) {
      throw std::length_error("fewer points: vertices are numbered in 29 bits");
    }
    const uint64_t id = keys_.size();
    keys_.push_back(key);
    slots_[at] = slot_of(h, id);
    if (keys_.size() * 2 > mask_) resize(static_cast<int64_t>(keys_.size()) * 2);
    return static_cast<int32_t>(id);
  }

  // found[i]: the vertex of keys[i] + move, or 0.
  void find(const Key* keys, const Key& move, int64_t count, const Kernels& kernels, int32_t* found) const {
    if constexpr (kWords == 1) {
      kernels.find({slots_, &keys_[0].word[0], mask_, shift_}, &keys[0].word[0], move.word[0], count, found);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        Key key = keys[i];
        for (int w = 0; w < kWords; ++w) key.word[w] += move.word[w];
        const uint64_t h = hash(key);
        size_t at = h >> shift_;
        while (slots_[at] >> 32 != 0 && !same(slots_[at], h, key)) at = (at + 1) & mask_;
        found[i] = static_cast<int32_t>(slots_[at] >> 32);
      }
    }
  }

  const std::vector<Key>& keys() const { return keys_; }  // keys()[0] is none

 private:
  static uint64_t hash(const Key& key) {
    uint64_t folded = key.word[0];
    for (int i = 1; i < kWords; ++i) folded = (folded ^ (folded >> 32)) * kHashFactor + key.word[i];
    folded *= kHashFactor;
    return folded ^ (folded >> kHashFold);
  }

  static uint64_t slot_of(uint64_t hash, uint64_t id) { return id << 32 | static_cast<uint32_t>(hash); }

  bool same(uint64_t slot, uint64_t hash, const Key& key) const {
    return static_cast<uint32_t>(slot) == static_cast<uint32_t>(hash) && keys_[slot >> 32] == key;
  }

  void resize(int64_t expected) {
    int bits = 10;
    while ((int64_t{1} << bits) < 2 * expected) ++bits;
    shift_ = 64 - bits, mask_ = (size_t{1} << bits) - 1;
    slots_ = memory_.get(static_cast<int64_t>(mask_) + 1);
    std::fill(slots_, slots_ + mask_ + 1, 0);
    for (size_t id = 1; id < keys_.size(); ++id) {
      const uint64_t h = hash(keys_[id]);
      size_t at = h >> shift_;
      while (slots_[at] != 0) at = (at + 1) & mask_;
      slots_[at] = slot_of(h, id);
    }
  }

  std::vector<Key> keys_ = std::vector<Key>(1);
  Buffer<uint64_t> memory_;
  uint64_t* slots_ = nullptr;
  uint64_t mask_ = 0;
  int32_t shift_ = 0;
};

class Permutohedral {
 public:
  struct Range {
    float low, high;
  };

  // one_channel: for filters of one channel alone, which have a quicker blur. filled: as pydensecrf has it, which fills
  // the last four points up with points at the origin: their vertices have no weight, but pass blurred values on.
  // fill(begin, end, out, stride): features of points [begin, end) to out[dim * stride + point - begin]; ranges: of
  // each dimension, over all points, and 0.
  template <typename Fill>
  Permutohedral(int64_t points, const std::vector<Range>& ranges, bool one_channel, bool filled, const Kernels& kernels,
                Fill&& fill)
      : points_(points),
        dims_(static_cast<int32_t>(ranges.size())),
        one_channel_(one_channel),
        filled_(filled && points % 4 != 0) {
    const int64_t total = tiles_of(points) * kTile * (dims_ + 1);
    if (total >= (int64_t{1} << 40)) throw std::length_error("fewer points");
    EmbedJob job{};
    job.points = points, job.dims = dims_, job.weights = weights_.get(total);
    corners_.get(total);
    touched_.get(tiles_of(points) + 1)[0] = 1;
    const auto spread = static_cast<float>(std::sqrt(2.0 / 3.0) * (dims_ + 1));  // rounded, as pydensecrf's is
    for (int32_t i = 0; i < dims_; ++i) {
      job.scale[i] = static_cast<float>(1.0 / std::sqrt((i + 2.0) * (i + 1.0)) * spread);
    }
    lay_out_keys(ranges, job);
    if (job.words == 1) {
      connect<1>(job, kernels, fill);
    } else {
      connect<2>(job, kernels, fill);
    }
  }

  LatticeArrays arrays() const {
    return {points_,       dims_,        vertices_,        corners_.data(),
            weights_.data(), links_.data(), segments_.data(), pairs_.data(),
            touched_.data()};
  }
  Buffer<int32_t>& corners() { return corners_; }
  Buffer<float>& weights() { return weights_; }
  Buffer<int32_t>& links() { return links_; }
  const std::vector<int64_t>& segments() const { return segments_; }

 private:
  static constexpr int64_t kChunk = 512;  // tiles whose keys are held at a time

  int64_t points_;
  int32_t dims_, vertices_ = 0;
  bool one_channel_, filled_;
  Buffer<int32_t> corners_;
  Buffer<float> weights_;
  Buffer<int32_t> links_;
  std::vector<int64_t> segments_;
  Buffer<int32_t> pairs_, touched_;

  // The bit field of each of the first dims coordinates, wide enough for every vertex and its neighbours. Coordinate j
  // is the sum of the scaled features from j on, less j times the one before those.
  void lay_out_keys(const std::vector<Range>& ranges, EmbedJob& job) const {
    std::vector<double> low(dims_ + 1), high(dims_ + 1);
    double least = 0, most = 0;
    for (int32_t j = dims_; j > 0; --j) {
      const double a = static_cast<double>(ranges[j - 1].low) * job.scale[j - 1];
      const double b = static_cast<double>(ranges[j - 1].high) * job.scale[j - 1];
      low[j] = least - j * b, high[j] = most - j * a;
      least += a, most += b;
    }
    low[0] = least, high[0] = most;
    for (int32_t j = 0; j <= dims_; ++j) {
      if (!(std::max(std::abs(low[j]), std::abs(high[j])) < 4e6 * (dims_ + 1))) {
        throw std::range_error("larger standard deviations: positions on the lattice exceed what float32 tells apart");
      }
    }
    const double slack = 4.0 * (dims_ + 1);  // rounding to the lattice, wrapping, corners, neighbours
    int word = 0, used = 0;
    for (int32_t i = 0; i < dims_; ++i) {
      job.lowest[i] = static_cast<int32_t>(std::floor(low[i] - slack));
      int bits = 1;
      while (std::ldexp(1.0, bits) <= high[i] + slack - job.lowest[i]) ++bits;
      if (used + bits > 64) ++word, used = 0;
      if (word >= kKeyWords) {
        throw std::range_error("larger standard deviations: the lattice's coordinates exceed 128 bits");
      }
      job.unit[i][word] = uint64_t{1} << used;
      used += bits;
    }
    job.words = word + 1;
  }

  // Numbers the vertices in the order in which points touch them. Threads number those of a part of the points each,
  // and the parts' numbers are made one after another: the order, and so every number, is that of one thread.
  template <int kWords, typename Fill>
  void connect(const EmbedJob& job, const Kernels& kernels, Fill&& fill) {
    const int64_t tiles = tiles_of(points_);
    const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    const int64_t parts = std::min(threads, 1 + tiles / (2 * kChunk));
    const int64_t expected = std::min<int64_t>(points_ / parts, 1 << 17);
    std::vector<VertexTable<kWords>> tables;
    for (int64_t part = 0; part < parts; ++part) tables.emplace_back(expected);
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        number(job, kernels, fill, tiles * part / parts, tiles * (part + 1) / parts, tables[part]);
      }
    });
    for (int64_t part = 1; part < parts; ++part) {
      const auto& keys = tables[part].keys();
      std::vector<int32_t> renumbered(keys.size());
      tables[0].find(keys.data(), {}, static_cast<int64_t>(keys.size()), kernels, renumbered.data());
      renumbered[0] = 0;
      for (size_t id = 1; id < keys.size(); ++id) {
        if (renumbered[id] == 0) renumbered[id] = tables[0].insert(keys[id]);
      }
      const int64_t first = tiles * part / parts, last = tiles * (part + 1) / parts, size = (dims_ + 1) * kTile;
      at::parallel_for(first, last, 256, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * size; i < end * size; ++i) {
          corners_.data()[i] = kCornerScale * renumbered[corners_.data()[i] / kCornerScale];
        }
      });
      int32_t touched = touched_.data()[first];
      for (int64_t tile = first; tile < last; ++tile) {
        for (int64_t i = tile * size; i < (tile + 1) * size; ++i) {
          touched = std::max(touched, corners_.data()[i] / kCornerScale + 1);
        }
        touched_.data()[tile + 1] = touched;
      }
    }
    link(tables[0], job, kernels);
  }

  // Embeds the points of tiles [begin, end) and looks their corners up in `table`.
  template <int kWords, typename Fill>
  void number(EmbedJob job, const Kernels& kernels, Fill&& fill, int64_t begin, int64_t end,
              VertexTable<kWords>& table) {
    using Key = typename VertexTable<kWords>::Key;
    const int32_t count = dims_ + 1;
    const int64_t chunk = std::min(kChunk, end - begin);
    Buffer<float> features;
    Buffer<uint64_t> keys;
    job.keys = keys.get(chunk * kWords * count * kTile);
    job.feature_stride = chunk * kTile, job.features = features.get(job.feature_stride * dims_);
    for (job.begin = begin; job.begin < end; job.begin += chunk) {
      job.end = std::min(job.begin + chunk, end);
      const int64_t from = job.begin * kTile;
      fill(from, std::min(job.end * kTile, points_), features.data(), job.feature_stride);
      kernels.embed(job);
      for (int64_t tile = job.begin; tile < job.end; ++tile) {
        const uint64_t* words = job.keys + (tile - job.begin) * kWords * count * kTile;
        Key gathered[kWords == 1 ? 1 : (kMaxDims + 1) * kTile];
        const Key* own = gathered;
        if constexpr (kWords == 1) {
          own = reinterpret_cast<const Key*>(words);
        } else {
          for (int32_t i = 0; i < count * kTile; ++i) {
            for (int w = 0; w < kWords; ++w) gathered[i].word[w] = words[w * count * kTile + i];
          }
        }
        int32_t* corner = corners_.data() + tile * count * kTile;
        table.find(own, Key{}, count * kTile, kernels, corner);
        const int64_t used = std::min<int64_t>(kTile, points_ - tile * kTile);
        for (int32_t i = 0; i < count * kTile; ++i) {
          // what lies beyond the last point is embedded at the origin
          if (corner[i] == 0 && (i % kTile < used || filled_)) corner[i] = table.insert(own[i]);
        }
        for (int32_t i = 0; i < count * kTile; ++i) corner[i] *= kCornerScale;
        for (int64_t lane = used; lane < kTile; ++lane) {
          for (int32_t r = 0; r < count; ++r) corner[r * kTile + lane] = 0;
        }
        touched_.data()[tile + 1] = static_cast<int32_t>(table.keys().size());
      }
    }
  }

  // The neighbours along each axis: as pairs; or as lines of vertices, sorted by their length, long ones closed by a 0,
  // where one that is alone is left out.
  template <int kWords>
  void link(const VertexTable<kWords>& table, const EmbedJob& job, const Kernels& kernels) {
    using Key = typename VertexTable<kWords>::Key;
    const std::vector<Key>& keys = table.keys();
    const int32_t count = dims_ + 1;
    vertices_ = static_cast<int32_t>(keys.size());
    const int64_t stride = arrays().stride();
    if (one_channel_) pairs_.get(2 * count * stride);
    std::vector<Buffer<int32_t>> lines(one_channel_ ? 0 : count * kSegments);
    std::vector<int64_t> sizes(lines.size());
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      Buffer<int32_t> own, starts;
      std::vector<uint8_t> inner(one_channel_ ? 0 : vertices_);  // has one before
      for (int64_t axis = begin; axis < end; ++axis) {
        Key move{};  // by one in every coordinate, and dims + 1 back along the axis
        for (int w = 0; w < kWords; ++w) {
          for (int32_t i = 0; i < dims_; ++i) move.word[w] += job.unit[i][w];
          if (axis < dims_) move.word[w] -= job.unit[axis][w] * static_cast<uint64_t>(count);
        }
        int32_t* after = one_channel_ ? pairs_.data() + (2 * axis + 1) * stride : own.get(vertices_);
        after[0] = 0;
        table.find(&keys[0] + 1, move, vertices_ - 1, kernels, after + 1);
        if (one_channel_) {
          int32_t* before = after - stride;
          std::fill(before, before + stride, 0);
          std::fill(after + vertices_, after + stride, 0);
          for (int32_t v = 1; v < vertices_; ++v) before[after[v]] = v;
          before[0] = 0;
          continue;
        }
        std::fill(inner.begin(), inner.end(), 0);
        for (int32_t v = 1; v < vertices_; ++v) inner[after[v]] = 1;
        int32_t* start = starts.get(vertices_);
        int64_t count_of_starts = 0;
        for (int32_t v = 1; v < vertices_; ++v) {
          start[count_of_starts] = v;
          count_of_starts += !inner[v] && after[v] != 0;
        }
        write_lines(start, count_of_starts, after, &lines[axis * kSegments], &sizes[axis * kSegments]);
      }
    });
    if (one_channel_) return;
    segments_.assign(1, 0);
    for (const int64_t size : sizes) segments_.push_back(segments_.back() + size);
    int32_t* links = links_.get(segments_.back() + kLinksAhead);
    for (size_t i = 0; i < lines.size(); ++i) std::copy_n(lines[i].data(), sizes[i], links + segments_[i]);
    std::fill_n(links + segments_.back(), kLinksAhead, 0);
  }

  // The lines that begin at the vertices `start`, each into the segment of its length.
  void write_lines(const int32_t* start, int64_t count, const int32_t* after, Buffer<int32_t>* lines, int64_t* sizes) {
    int32_t* out[kSegments];
    for (int s = 0; s < kSegments; ++s) {
      const int64_t most = s + 1 < kSegments ? count * (s + 2) : vertices_ + count;
      out[s] = lines[s].get(std::min<int64_t>(most, vertices_ + count) + kLongestLine);
    }
    for (int64_t i = 0; i < count; ++i) {
      int32_t line[kLongestLine] = {}, length = 0, at = start[i];
      for (; at != 0 && length < kLongestLine; at = after[at]) line[length++] = at;
      int32_t*& to = out[at == 0 ? length - 2 : kSegments - 1];
      std::memcpy(to, line, sizeof line);  // of one size, whatever the length
      to += length;
      if (at == 0) continue;
      for (; at != 0; at = after[at]) *to++ = at;
      *to++ = 0;
    }
    for (int s = 0; s < kSegments; ++s) sizes[s] = out[s] - lines[s].data();
  }
};

}  // namespace ribfast::cpu
