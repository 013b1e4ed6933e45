// An iteration is one pass over the points, which slices the blurred values of every lattice, updates the energies,
// takes the softmax and splats the result (so a point's corners and weights are read once), and the blurs.
#include "mean_field.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace ribfast::cpu {
namespace {

// Floats from one vertex to the next where the values of `channel`, the first of such, stand: blocks of 16 stand
// together.
int32_t vertex_width(int32_t channel, int32_t channels) {
  return channel == 0 && channels >= 16 ? channels / 16 * 16 : block_of(channel, channels).width;
}

// Blurs one channel along every axis, from one buffer to the other and back; returns the one that holds the result.
float* blur_one(const LatticeArrays& lattice, const Kernels& kernels, float* values, float* other) {
  for (int32_t axis = 0; axis <= lattice.dims; ++axis) {
    const int32_t* before = lattice.pairs + 2 * axis * lattice.stride();
    at::parallel_for(0, lattice.stride() / kTile, 1 + 16384 / kTile, [&](int64_t begin, int64_t end) {
      kernels.blur_one(values, before, before + lattice.stride(), begin * kTile, end * kTile, other);
    });
    std::swap(values, other);
    values[0] = 0;
  }
  return values;
}

// Blurs every block of channels along every axis: in place, split among threads at lines' ends; one channel of a
// lattice made for that with the help of `other`. Returns the buffer that holds the result.
float* blur(const LatticeArrays& lattice, int32_t channels, int32_t parts, bool backwards, const Kernels& kernels,
            float* values, float* other) {
  if (lattice.pairs != nullptr) return blur_one(lattice, kernels, values, other);
  for (int32_t first = 0; first < channels * parts;) {
    const int32_t width = vertex_width(first % channels, channels);
    float* block = values + first * lattice.stride();
    for (int32_t step = 0; step <= lattice.dims; ++step) {
      const int32_t axis = backwards ? lattice.dims - step : step;
      const int64_t* segments = lattice.segments + axis * kSegments;
      const int64_t all = segments[kSegments] - segments[0];
      const int64_t threads = std::min<int64_t>(at::get_num_threads(), 1 + all * width / 65536);
      at::parallel_for(0, threads, 1, [&](int64_t first_thread, int64_t last_thread) {
        for (int32_t segment = 0; segment < kSegments; ++segment) {
          const int32_t* links = lattice.links + segments[segment];
          const int64_t size = segments[segment + 1] - segments[segment];
          const int32_t length = segment + 2;
          const auto line_at = [&](int64_t at) {  // the first line that begins at or behind `at`
            if (length <= kLongestLine) return (at + length - 1) / length * length;
            while (at > 0 && at < size && links[at - 1] != 0) ++at;
            return at;
          };
          const int64_t begin = line_at(size * first_thread / threads), end = line_at(size * last_thread / threads);
          if (begin < end) kernels.blur(block, links, begin, end, length, lattice.spare(), width);
        }
      });
    }
    first += width;
  }
  return values;
}

LatticeView view_of(const LatticeArrays& lattice) {
  LatticeView view{};
  view.corners = lattice.corners, view.weights = lattice.weights;
  view.dims = lattice.dims, view.stride = lattice.stride();
  return view;
}

// How many channels stand for the labels, and how (PixelJob).
struct Layout {
  bool reduced;
  int32_t used, group, channels, parts;

  // given: energies of given labels, whose differences are exact; any others may be too large to be subtracted.
  Layout(int64_t labels, int64_t labellings, bool given, bool exact) {
    const auto all = static_cast<int32_t>(labels);
    reduced = !exact && (all == 2 || (all == 3 && given) || (all > 1 && all % 4 == 1));
    used = all - reduced;
    const int32_t padded = (used + 3) / 4 * 4;
    group = exact || used > 4 || (all == 5 && !given) ? 0 : reduced ? used : 4;
    const auto together = static_cast<int32_t>(labellings * (group == 0 ? padded : group));
    channels = group == 0 ? padded : together == 1 ? 1 : (together + 3) / 4 * 4;
    parts = group == 0 ? static_cast<int32_t>(labellings) : 1;
  }

  int32_t each() const { return group == 0 ? channels : group; }

  // Where the first point's channel of a labelling stands in a tile's rows; the next point's is `width` further.
  int64_t row_of(int64_t labelling, int32_t channel, int32_t& width) const {
    const int64_t at = labelling * each() + channel, part = at / channels;
    const auto inside = static_cast<int32_t>(at % channels);
    const ChannelBlock block = block_of(inside, channels);
    width = block.width;
    return part * channels * kTile + block.first * kTile + inside - block.first;
  }
};

// Sets vertex 0, and what lies behind the last vertex that a point touches, to 0.
void clear_untouched(const LatticeArrays& lattice, int32_t channels, int32_t parts, float* values) {
  for (int32_t first = 0; first < channels * parts;) {
    const int32_t width = vertex_width(first % channels, channels);
    float* block = values + first * lattice.stride();
    const int64_t end = lattice.touched[lattice.tiles()];
    std::memset(block, 0, sizeof(float) * width);
    std::memset(block + end * width, 0, sizeof(float) * width * (lattice.stride() - end));
    first += width;
  }
}

constexpr float kLargest = 3e38f;  // of an energy that messages are still added to
constexpr int64_t kMostOfCopies = int64_t{1} << 28;  // floats that threads' own vertices may take, a lattice

struct Values {
  Buffer<float> first, second;
  float *sliced = nullptr, *splat = nullptr;
};

}  // namespace

const float* normalize(const LatticeArrays& lattice, Normalization how, const Kernels& kernels, Buffer<float>& factor) {
  if (how == kNone) return nullptr;
  Buffer<float> values;
  LatticeView view = view_of(lattice);
  view.splat = values.get(2 * lattice.stride());
  std::memset(view.splat, 0, sizeof(float) * lattice.stride());
  kernels.splat(view, 0, lattice.tiles(), 1, nullptr);
  view.values = blur(lattice, 1, 1, false, kernels, view.splat, view.splat + lattice.stride());
  float* f = factor.get(lattice.tiles() * kTile);
  at::parallel_for(0, lattice.tiles(), 1024, [&](int64_t begin, int64_t end) {
    kernels.slice(view, begin, end, 1, f + begin * kTile);
    for (int64_t p = begin * kTile; p < end * kTile; ++p) {
      f[p] = how == kSymmetric ? 1 / std::sqrt(f[p] + 1e-20f) : 1 / (f[p] + 1e-20f);
    }
  });
  return f;
}

void filter(const LatticeArrays& lattice, const float* values, int64_t channels, bool transpose, const Kernels& kernels,
            float* result) {
  const auto padded = static_cast<int32_t>(channels == 1 ? 1 : (channels + 3) / 4 * 4);
  const int64_t tiles = lattice.tiles(), size = lattice.stride() * padded;
  Buffer<float> vertices;
  LatticeView view = view_of(lattice);
  view.values = view.splat = vertices.get(size);
  std::memset(view.splat, 0, sizeof(float) * size);
  const int64_t chunk = std::min<int64_t>(64, tiles);
  const int64_t row_size = int64_t{kTile} * padded;
  // f(address in rows of the chunk, address in values) for each value of the chunk's points
  const auto over_rows = [&](int64_t begin, int64_t end, auto&& f) {
    for (int64_t p = begin * kTile; p < std::min(end * kTile, lattice.points); ++p) {
      const int64_t tile = (p / kTile - begin) * row_size, lane = p % kTile;
      for (int32_t c = 0; c < channels; ++c) {
        const ChannelBlock block = block_of(c, padded);
        f(tile + block.first * kTile + lane * block.width + c - block.first, p * channels + c);
      }
    }
  };
  std::vector<float> rows(chunk * row_size);
  for (int64_t begin = 0; begin < tiles; begin += chunk) {
    const int64_t end = std::min(begin + chunk, tiles);
    std::fill(rows.begin(), rows.end(), 0.0f);
    over_rows(begin, end, [&](int64_t row, int64_t at) { rows[row] = values[at]; });
    kernels.splat(view, begin, end, padded, rows.data());
  }
  blur(lattice, padded, 1, transpose, kernels, view.splat, nullptr);
  at::parallel_for(0, tiles, chunk, [&](int64_t from, int64_t to) {
    std::vector<float> own(chunk * row_size);
    for (int64_t begin = from; begin < to; begin += chunk) {
      const int64_t end = std::min(begin + chunk, to);
      kernels.slice(view, begin, end, padded, own.data());
      over_rows(begin, end, [&](int64_t row, int64_t at) { result[at] = own[row]; });
    }
  });
}

bool MeanField::has_one_channel() const { return Layout(labels, labellings, unary == nullptr, exact).channels == 1; }

void MeanField::run(const Kernels& kernels) const {
  if (labellings == 0 || points == 0) return;
  const Layout layout(labels, labellings, unary == nullptr, exact);
  const int32_t channels = layout.channels, parts = layout.parts, used = layout.used;
  const int64_t row_size = int64_t{kTile} * channels * parts, tiles = tiles_of(points);
  int64_t threads = exact || at::in_parallel_region() ? 1 : std::min<int64_t>(at::get_num_threads(), 1 + tiles / 256);
  for (const Term& term : terms) {
    // each but the first clears, fills and adds up vertices of its own: no more of that than there is to splat, or
    // memory
    const LatticeArrays& lattice = term.lattice;
    threads = std::min(threads, 1 + points * (lattice.dims + 1) / lattice.vertices);
    threads = std::min<int64_t>(threads, 1 + kMostOfCopies / (lattice.stride() * channels * parts));
  }
  std::vector<Values> values(terms.size());
  for (size_t i = 0; i < terms.size(); ++i) {
    const int64_t size = terms[i].lattice.stride() * channels * parts;
    values[i].sliced = values[i].first.get(size), values[i].splat = values[i].second.get(size);
  }
  const auto pixel = [&](int64_t point) { return order == nullptr ? point : int64_t{order[point]}; };
  // f(k, pixel) for the points of a tile; nearly always their pixels are in a row, which compilers make vectors of
  const auto over_pixels = [&](int64_t tile, auto&& f) {
    const int64_t begin = tile * kTile, count = std::min<int64_t>(kTile, points - begin), from = pixel(begin);
    if (count == kTile && pixel(begin + kTile - 1) == from + kTile - 1) {
      for (int64_t k = 0; k < kTile; ++k) f(k, from + k);
    } else {
      for (int64_t k = 0; k < count; ++k) f(k, pixel(begin + k));
    }
  };
  PixelJob job{};
  job.count = static_cast<int32_t>(terms.size());
  job.channels = channels, job.parts = parts, job.group = layout.group;
  job.reduced = layout.reduced, job.exact = exact, job.labels = static_cast<int32_t>(labels);
  Buffer<float> energies, left_out;
  Buffer<uint8_t> ordered;
  if (unary != nullptr) {
    float* rows = energies.get(tiles * row_size);
    job.negative_unary = rows;
    // of two labels the one's energy above the other's, finite even where an infinite one forbids a label
    const bool differences = layout.reduced && layout.group == 1;
    const auto difference = [](float of, float from) { return std::clamp(of - from, -kLargest, kLargest); };
    float* last = nullptr;
    if (layout.reduced && !differences) job.left_out = last = left_out.get(tiles * parts * kTile);
    at::parallel_for(0, tiles, 256, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        float* own = rows + tile * row_size;
        const int64_t count = std::min<int64_t>(kTile, points - tile * kTile);
        if (labellings * used < int64_t{channels} * parts) std::fill(own, own + row_size, -INFINITY);
        for (int64_t n = 0; n < labellings; ++n) {
          const float* all = unary + n * labels * points;
          for (int32_t c = 0; c < used; ++c) {
            int32_t width;
            float* to = own + layout.row_of(n, c, width);
            const float* from = all + c * points;
            if (differences) {
              over_pixels(tile, [&](int64_t k, int64_t p) { to[k * width] = difference(from[points + p], from[p]); });
            } else {
              over_pixels(tile, [&](int64_t k, int64_t p) { to[k * width] = -from[p]; });
            }
            for (int64_t k = count; k < kTile; ++k) to[k * width] = 0;
          }
          for (int64_t k = 0; k < kTile && last != nullptr; ++k) {  // a labelling a part
            last[(tile * parts + n) * kTile + k] = k < count ? -all[used * points + pixel(tile * kTile + k)] : 0.0f;
          }
        }
      }
    });
  } else {
    const int64_t stride = tiles * kTile;
    uint8_t* out = ordered.get(labellings * stride);
    for (int64_t n = 0; n < labellings; ++n) {
      for (int64_t p = 0; p < points; ++p) out[n * stride + p] = given[n * points + pixel(p)];
      std::memset(out + n * stride + points, 0, stride - points);
    }
    job.given = out, job.given_stride = stride, job.labellings = static_cast<int32_t>(labellings);
    job.unsure = unsure;
    job.gain = static_cast<float>(std::log(confidence));
    const double other = std::log((1 - confidence) / static_cast<double>(labels - 1));
    job.otherwise = labels == 1 ? job.gain : static_cast<float>(other);
  }

  const auto views = [&](bool sliced, bool splat) {
    std::vector<LatticeView> all;
    for (size_t i = 0; i < terms.size(); ++i) {
      const Term& term = terms[i];
      LatticeView v = view_of(term.lattice);
      v.strength = term.strength;
      v.before = term.how == kSymmetric || term.how == kBefore ? term.factor : nullptr;
      v.after = term.how == kSymmetric || term.how == kAfter ? term.factor : nullptr;
      v.values = sliced ? values[i].sliced : nullptr, v.splat = splat ? values[i].splat : nullptr;
      all.push_back(v);
    }
    return all;
  };
  // beside the first thread's, each thread splats into memory of its own; added up in the threads' order
  std::vector<std::vector<Buffer<float>>> others(threads - 1);
  for (auto& own : others) own.resize(terms.size());
  for (int64_t iteration = 0; iteration < iterations; ++iteration) {
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(kTogether * row_size);
      for (int64_t thread = begin; thread < end; ++thread) {
        auto own = views(iteration > 0, true);
        for (size_t i = 0; i < terms.size(); ++i) {
          const LatticeArrays& lattice = terms[i].lattice;
          const int64_t size = lattice.stride() * channels * parts;
          if (thread > 0) own[i].splat = others[thread - 1][i].get(size);
          if (threads == 1 && channels >= 16 && lattice.touched != nullptr) {
            own[i].touched = lattice.touched;
            clear_untouched(lattice, channels, parts, own[i].splat);
          } else {
            std::memset(own[i].splat, 0, sizeof(float) * size);
          }
        }
        PixelJob part = job;
        part.lattices = own.data(), part.begin = tiles * thread / threads, part.end = tiles * (thread + 1) / threads;
        kernels.update(part, scratch.data());
      }
    });
    for (size_t i = 0; i < terms.size(); ++i) {
      const LatticeArrays& lattice = terms[i].lattice;
      float* sum = values[i].splat;
      if (threads > 1) {
        at::parallel_for(0, lattice.stride() * channels * parts, 65536, [&](int64_t begin, int64_t end) {
          for (auto& own : others) {
            const float* other = own[i].data();
            for (int64_t k = begin; k < end; ++k) sum[k] += other[k];
          }
        });
      }
      float *free = values[i].sliced, *blurred = blur(lattice, channels, parts, false, kernels, sum, free);
      values[i].sliced = blurred, values[i].splat = blurred == sum ? free : sum;
    }
  }

  constexpr int64_t kChunk = 16;  // tiles whose probabilities are held at a time
  at::parallel_for(0, tiles, 256, [&](int64_t from, int64_t to) {
    const auto own = views(iterations > 0, false);
    const int64_t rest_size = layout.group != 0 ? row_size : int64_t{parts} * kTile;
    std::vector<float> rows(kChunk * row_size), rest_rows(kChunk * rest_size);
    for (int64_t begin = from; begin < to; begin += kChunk) {
      PixelJob part = job;
      part.lattices = own.data(), part.begin = begin, part.end = std::min(begin + kChunk, to);
      part.probabilities = rows.data(), part.left_out_probabilities = rest_rows.data();
      kernels.update(part, nullptr);
      for (int64_t tile = begin; tile < part.end; ++tile) {
        const float* tile_rows = rows.data() + (tile - begin) * row_size;
        const float* tile_rest = rest_rows.data() + (tile - begin) * rest_size;
        for (int64_t n = 0; n < labellings; ++n) {
          float top[kTile];
          int32_t label[kTile] = {};
          for (int k = 0; k < kTile; ++k) top[k] = -1;
          for (int32_t c = 0; c < labels; ++c) {
            int32_t width = 1;
            const float* row = tile_rest + n * kTile;
            if (c < used) {
              row = tile_rows + layout.row_of(n, c, width);
            } else if (layout.group != 0) {
              row = tile_rest + layout.row_of(n, 0, width);
            }
            if (probabilities != nullptr) {
              float* to = probabilities + (n * labels + c) * points;
              over_pixels(tile, [&](int64_t k, int64_t p) { to[p] = row[k * width]; });
              continue;
            }
            for (int64_t k = 0; k < kTile; ++k) {
              const float q = row[k * width];
              label[k] = q > top[k] ? c : label[k], top[k] = q > top[k] ? q : top[k];
            }
          }
          if (best == nullptr) continue;
          over_pixels(tile, [&](int64_t k, int64_t p) { best[n * points + p] = static_cast<uint8_t>(label[k]); });
        }
      }
    }
  });
}

}  // namespace ribfast::cpu
