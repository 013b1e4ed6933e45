// Mean field over permutohedral lattices (Kraehenbuehl & Koltun 2011): Q = softmax(-U + sum of strength * n K(n Q)).
//
// Layout: images (H, W, 3) uint8, unary and probabilities (L, H, W), label maps (H, W) uint8, all contiguous; points in
// tiles of 16 x 16 pixels (lattice.cuh). Between passes nothing but lattice values is kept: an iteration is one pass
// over the tiles, which slices the blurred values, adds the unary, takes the softmax and sums what each vertex of the
// tile receives; then these sums are gathered and blurred. A tile's vertices are loaded into shared memory once, as
// many as fit; the others are read where they stand. Any number of labels: up to kGroupMost channels a thread keeps its
// pixel's energies in registers, beyond they are in memory and channels are passed through in groups.
//
// As on the CPU, fast mode leaves out the last label where that saves a vector: what is filtered, and so the messages
// too, are differences to it.
#pragma once

#include <map>
#include <utility>

#include "lattice.cuh"

namespace ribfast::cuda {

constexpr int kTerms = 2, kCornersOfTerms = 3 + 6;
constexpr int kGroupMost = 32, kGroup = 16;  // channels that registers hold; channels of a group where there are more
constexpr int kSpaceBytes = 38400;           // of the vertices' values; with the weights below 48 KiB

struct CrfImage {
  const float* unary;    // (L, H, W), or null:
  const uint8_t* given;  // (H, W) labels
  float* probabilities;  // (L, H, W), or null:
  uint8_t* chosen;       // (H, W) the most probable label
  float* scratch;        // [point of every tile][channels], where energies are in memory
  int32_t labels, height, width, tiles, terms;
  int32_t fields[kTerms];
};

struct CrfStep {
  float gap;       // energy by which a given label is below the others
  int32_t unsure;  // the label that says nothing, or -1
  int32_t channels;
  bool first, last, reduced, exact, before, after;
};

// Blocks that a multiprocessor is to hold: as many as their registers allow without being kept in memory.
template <int kVec, int kVectors, bool kMany>
constexpr int kBlocks = kMany || kVectors > 6 ? 2 : kVectors > 1 ? 3 : kVec > 1 ? 4 : 5;

template <int kVec, int kVectors, bool kMany>
__global__ void __launch_bounds__(kTilePoints, kBlocks<kVec, kVectors, kMany>)
    update_kernel(const Lattice* __restrict__ lattices, const Field* __restrict__ fields,
                  const CrfImage* __restrict__ images, const CrfStep step) {
  using Value = Pack<float, kVec>;
  constexpr int kStride = kVec == 1 ? 1 : kVectors | 1;  // an odd number of vectors spreads rows over the banks
  constexpr int kFitting = kSpaceBytes / (kStride * static_cast<int>(sizeof(Value)));
  constexpr int kRows = kFitting < 3 * kTilePoints ? kFitting : 3 * kTilePoints;
  static_assert(kRows >= kTilePoints);
  __shared__ Value space[kRows * kStride];
  __shared__ float weights[kTilePoints * kCornersOfTerms];
  const CrfImage& image = images[blockIdx.y];
  const int32_t tile = blockIdx.x, thread = threadIdx.x;
  if (tile >= image.tiles) return;
  const int32_t pixel = pixel_of(image.height, image.width, tile, thread), place = tile * kTilePoints + thread;
  const int64_t area = static_cast<int64_t>(image.height) * image.width;
  const int32_t used = image.labels - step.reduced, terms = image.terms, vectors = step.channels / kVec;
  const int32_t groups = kMany ? vectors / kVectors : 1;
  float* scratch = kMany ? image.scratch + static_cast<int64_t>(place) * step.channels : nullptr;

  // where the term's weights, and its rows in `space`, end
  const auto weights_of = [&](const Lattice& lattice) { return kTilePoints * (lattice.dims + 1); };
  const auto rows_of = [&](const Lattice& lattice, int32_t taken) {
    return min(__ldg(lattice.runs + tile), kRows - taken);
  };

  for (int k = 0, begin = 0; k < terms; ++k) {
    const Lattice& lattice = lattices[fields[image.fields[k]].lattice];
    const int32_t count = weights_of(lattice);
    const float* from = lattice.weights + static_cast<int64_t>(tile) * count;
    for (int32_t i = thread; i < count; i += kTilePoints) weights[begin + i] = __ldg(from + i);
    begin += count;
  }

  int32_t own = -1;  // the label that is given
  float left_out = 0, base = 0;  // the left-out label's energy, negated; what is added to all the others'
  if (pixel >= 0) {
    if (image.unary != nullptr) {
      if (step.reduced) (step.channels == 1 ? base : left_out) = __ldg(image.unary + used * area + pixel);
      left_out = -left_out;
    } else {
      own = __ldg(image.given + pixel);
      own = own == step.unsure ? -1 : own;
      if (step.reduced && own == used) base = -step.gap;
    }
  }
  const auto energy_of = [&](int32_t c) {
    if (c >= used) return -INFINITY;
    if (pixel < 0) return 0.0f;
    return image.unary != nullptr ? base - __ldg(image.unary + c * area + pixel) : base + (c == own ? step.gap : 0.0f);
  };

  Value energy[kVectors];
  const auto keep = [&](int32_t group) {
    if constexpr (kMany) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) reinterpret_cast<Value*>(scratch)[group * kVectors + v] = energy[v];
    }
  };
  const auto recall = [&](int32_t group) {
    if constexpr (kMany) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) energy[v] = reinterpret_cast<const Value*>(scratch)[group * kVectors + v];
    }
  };

  float top = -INFINITY;
  int32_t best = 0;
  for (int32_t group = 0; group < groups; ++group) {
    const int32_t first_vector = group * kVectors;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int c = 0; c < kVec; ++c) energy[v].at[c] = energy_of((first_vector + v) * kVec + c);
    }
    if (group > 0) __syncthreads();
    if (!step.first) {
      for (int k = 0, taken = 0; k < terms; ++k) {
        const Field& field = fields[image.fields[k]];
        const Lattice& lattice = lattices[field.lattice];
        const auto* values = reinterpret_cast<const Value*>(blurred(field, lattice.dims)) + first_vector;
        const int32_t* vertex = lattice.vertex + static_cast<int64_t>(tile) * weights_of(lattice);
        const int32_t rows = rows_of(lattice, taken);
#pragma unroll 4
        for (int32_t i = thread; i < rows * kVectors; i += kTilePoints) {
          const int32_t row = i / kVectors, v = __ldg(vertex + row);
          space[(taken + row) * kStride + i % kVectors] =
              v != 0 ? load(values + static_cast<int64_t>(v) * vectors + i % kVectors) : Value{};
        }
        taken += rows;
      }
    }
    __syncthreads();
    if (!step.first && pixel >= 0) {
      for (int k = 0, taken = 0, begin = 0; k < terms; ++k) {
        const Field& field = fields[image.fields[k]];
        const Lattice& lattice = lattices[field.lattice];
        const int32_t dims = lattice.dims, rows = rows_of(lattice, taken);
        const int32_t* vertices = lattice.vertex + static_cast<int64_t>(tile) * weights_of(lattice);
        const float scale = slice_scale(dims) * field.strength * (step.after ? __ldg(lattice.factor + place) : 1.0f);
        for (int32_t r = 0; r <= dims; ++r) {
          const int32_t local = __ldg(lattice.local + corner_at(dims, place, r));
          const float weight = weights[begin + corner_at(dims, thread, r)] * scale;
          if (local < rows) {
            const Value* from = space + (taken + local) * kStride;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) add_product(energy[v], weight, from[v]);
          } else if (const int32_t vertex = __ldg(vertices + local)) {
            const auto* from = reinterpret_cast<const Value*>(blurred(field, dims)) +
                               static_cast<int64_t>(vertex) * vectors + first_vector;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) add_product(energy[v], weight, load(from + v));
          }
        }
        taken += rows, begin += weights_of(lattice);
      }
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int c = 0; c < kVec; ++c) {
        if (energy[v].at[c] > top) top = energy[v].at[c], best = (first_vector + v) * kVec + c;
      }
    }
    keep(group);
  }
  if (step.reduced && left_out > top) top = left_out, best = used;

  float sum = 0;
  const auto power = [&](float x) { return step.exact ? expf(x - top) : __expf(x - top); };
  for (int32_t group = 0; group < groups; ++group) {
    recall(group);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int c = 0; c < kVec; ++c) sum += energy[v].at[c] = power(energy[v].at[c]);
    }
    keep(group);
  }
  const float rest = step.reduced ? power(left_out) : 0.0f;  // of the label that is left out
  sum += rest;

  if (step.last) {
    if (pixel < 0) return;
    bool overflow = false;
    for (int k = 0; k < terms; ++k) overflow |= lattices[fields[image.fields[k]].lattice].status[kOverflow] != 0;
    if (image.chosen != nullptr) {
      image.chosen[pixel] = static_cast<uint8_t>(overflow ? 255 : best);
      return;
    }
    const float denominator = overflow ? NAN : sum;
    for (int32_t group = 0; group < groups; ++group) {
      recall(group);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int c = 0; c < kVec; ++c) {
          const int32_t label = (group * kVectors + v) * kVec + c;
          if (label < used) image.probabilities[label * area + pixel] = energy[v].at[c] / denominator;
        }
      }
    }
    if (step.reduced) image.probabilities[used * area + pixel] = rest / denominator;
    return;
  }

  if (step.before) {
    for (int k = 0, begin = 0; k < terms; ++k) {
      const Lattice& lattice = lattices[fields[image.fields[k]].lattice];
      const float factor = __ldg(lattice.factor + place);
      for (int32_t r = 0; r <= lattice.dims; ++r) weights[begin + corner_at(lattice.dims, thread, r)] *= factor;
      begin += weights_of(lattice);
    }
  }
  const float share = pixel >= 0 ? 1.0f / sum : 0.0f;
  for (int32_t group = 0; group < groups; ++group) {
    recall(group);
    __syncthreads();  // what stood in `space` has been read
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      Value q;
#pragma unroll
      for (int c = 0; c < kVec; ++c) q.at[c] = step.exact ? energy[v].at[c] / sum : (energy[v].at[c] - rest) * share;
      space[thread * kStride + v] = q;
    }
    __syncthreads();
    for (int k = 0, begin = 0; k < terms; ++k) {
      const Field& field = fields[image.fields[k]];
      const Lattice& lattice = lattices[field.lattice];
      const int32_t dims = lattice.dims, items = __ldg(lattice.runs + tile) * kVectors;
      const int64_t first = static_cast<int64_t>(tile) * weights_of(lattice);
      const uint16_t *starts = lattice.starts + first + tile, *order = lattice.order + first;
      auto* partial = reinterpret_cast<Value*>(field.partial) + group * kVectors;
      for (int32_t i = thread; i < items; i += kTilePoints) {
        const int32_t run = i / kVectors, v = i % kVectors, row = __ldg(lattice.row + first + run);
        const int32_t end = __ldg(starts + run + 1);
        Value received{};
#pragma unroll 4
        for (int32_t j = __ldg(starts + run); j < end; ++j) {
          const int32_t entry = __ldg(order + j), from = entry % kTilePoints;
          add_product(received, weights[begin + corner_at(dims, from, entry / kTilePoints)],
                      space[from * kStride + v]);
        }
        if (row >= 0) partial[static_cast<int64_t>(row) * vectors + v] = received;
      }
      begin += weights_of(lattice);
    }
  }
}

struct CrfOptions {
  bool has_gaussian, has_bilateral;
  float gaussian[2], bilateral[3];  // deviation, strength; in pixels, in colour, strength
  int32_t iterations;
  Normalization how;
  bool exact;
  int64_t capacity;
  float gap;
  int32_t unsure;
};

// One mean field; those of one launch have the same number of labels.
struct CrfInput {
  const uint8_t* image;
  const float* unary;
  const uint8_t* given;
  float* probabilities;
  uint8_t* chosen;
  int64_t height, width;
  int32_t labels;
};

struct CrfChannels {
  int32_t channels;
  bool reduced;
};

inline CrfChannels channels_of(int32_t labels, bool exact) {
  const bool reduced = !exact && labels > 1 && (labels == 2 || labels % 4 == 1);
  const int32_t used = labels - reduced;
  if (used == 1) return {1, reduced};
  return {used <= kGroupMost ? (used + 3) / 4 * 4 : (used + kGroup - 1) / kGroup * kGroup, reduced};
}

// What mean fields are computed with: descriptions, and their place in one buffer.
struct CrfPlan {
  std::vector<Lattice> lattices;  // spatial ones first, one for each size; bilateral ones, one for each image
  std::vector<Field> fields, mass;  // mass: the filters of ones
  std::vector<CrfImage> images;
  Lattice* lattice_table = nullptr;
  Field *field_table = nullptr, *mass_table = nullptr;
  CrfImage* image_table = nullptr;
  int32_t* statuses = nullptr;
  int64_t statuses_at = 0;  // in the buffer
  unsigned spatial = 0, tiles = 0;
  int64_t points = 0;
  CrfChannels channels{};
  bool fits = true;  // into 31 bits
};

inline CrfPlan plan(const CrfInput* inputs, size_t count, const CrfOptions& options, Arena& arena) {
  CrfPlan plan;
  plan.channels = channels_of(inputs[0].labels, options.exact);
  std::vector<int32_t> spatial_of(count, -1), bilateral_of(count, -1);
  const auto add = [&](const CrfInput& input, int32_t dims) {
    Lattice lattice{};
    plan.fits = plan.fits && describe(lattice, dims, input.height * input.width, input.height, input.width,
                                      options.capacity, true);
    lattice.image = input.image;
    lattice.space_deviation = dims == 2 ? options.gaussian[0] : options.bilateral[0];
    lattice.colour_deviation = options.bilateral[1];
    plan.lattices.push_back(lattice);
    plan.tiles = std::max<unsigned>(plan.tiles, lattice.tiles);
    plan.points = std::max<int64_t>(plan.points, lattice.points);
    return static_cast<int32_t>(plan.lattices.size() - 1);
  };
  std::map<std::pair<int64_t, int64_t>, int32_t> of_size;
  for (size_t i = 0; options.has_gaussian && i < count; ++i) {
    const auto [found, is_new] = of_size.try_emplace({inputs[i].height, inputs[i].width}, 0);
    if (is_new) found->second = add(inputs[i], 2);
    spatial_of[i] = found->second;
  }
  plan.spatial = static_cast<unsigned>(plan.lattices.size());
  for (size_t i = 0; options.has_bilateral && i < count; ++i) {
    const bool same = i > 0 && inputs[i].image == inputs[i - 1].image;  // problems of one image
    bilateral_of[i] = same ? bilateral_of[i - 1] : add(inputs[i], 5);
  }
  if (!plan.fits) return plan;

  arena.take(plan.lattice_table, static_cast<int64_t>(plan.lattices.size()));
  plan.statuses_at = arena.used;
  arena.take(plan.statuses, 2 * static_cast<int64_t>(plan.lattices.size()));
  for (Lattice& lattice : plan.lattices) {
    const int64_t points = int64_t{lattice.tiles} * kTilePoints, vertices = lattice.capacity + int64_t{1};
    lattice.status = plan.statuses == nullptr ? nullptr : plan.statuses + 2 * (&lattice - plan.lattices.data());
    arena.take(lattice.weights, points * (lattice.dims + 1));
    arena.take(lattice.neighbours, 2 * vertices * (lattice.dims + 1));
    take_tables(lattice, arena);
    take_scratch(lattice, arena);
    arena.take(lattice.factor, points);
    Field mass{};
    mass.lattice = static_cast<int32_t>(&lattice - plan.lattices.data()), mass.channels = 1;
    take_field(mass, lattice, arena);
    mass.output = lattice.factor;
    plan.mass.push_back(mass);
  }
  for (size_t i = 0; i < count; ++i) {
    CrfImage image{inputs[i].unary,
                   inputs[i].given,
                   inputs[i].probabilities,
                   inputs[i].chosen,
                   nullptr,
                   inputs[i].labels,
                   static_cast<int32_t>(inputs[i].height),
                   static_cast<int32_t>(inputs[i].width),
                   static_cast<int32_t>((inputs[i].height + kTileSide - 1) / kTileSide *
                                        ((inputs[i].width + kTileSide - 1) / kTileSide)),
                   0,
                   {}};
    for (const bool is_spatial : {true, false}) {
      const int32_t number = is_spatial ? spatial_of[i] : bilateral_of[i];
      if (number < 0) continue;
      Field field{};
      field.lattice = number, field.channels = plan.channels.channels;
      field.strength = is_spatial ? options.gaussian[1] : options.bilateral[2];
      take_field(field, plan.lattices[number], arena);
      image.fields[image.terms++] = static_cast<int32_t>(plan.fields.size());
      plan.fields.push_back(field);
    }
    if (plan.channels.channels > kGroupMost) {
      arena.take(image.scratch, int64_t{image.tiles} * kTilePoints * plan.channels.channels);
    }
    plan.tiles = std::max<unsigned>(plan.tiles, image.tiles);
    plan.images.push_back(image);
  }
  arena.take(plan.field_table, static_cast<int64_t>(plan.fields.size()));
  arena.take(plan.mass_table, static_cast<int64_t>(plan.mass.size()));
  arena.take(plan.image_table, static_cast<int64_t>(plan.images.size()));
  return plan;
}

template <int kVec, int kVectors, bool kMany, typename Run>
void iterate(const Run& run, const CrfPlan& plan, const CrfOptions& options) {
  CrfStep step{};
  step.gap = options.gap, step.unsure = options.unsure;
  step.channels = plan.channels.channels, step.reduced = plan.channels.reduced, step.exact = options.exact;
  step.before = options.how == kSymmetric || options.how == kBefore;
  step.after = options.how == kSymmetric || options.how == kAfter;
  const int32_t iterations = plan.fields.empty() ? 0 : options.iterations;
  for (int32_t i = 0; i <= iterations; ++i) {
    step.first = i == 0, step.last = i == iterations;
    run(update_kernel<kVec, kVectors, kMany>, dim3(plan.tiles, static_cast<unsigned>(plan.images.size())), kTilePoints,
        plan.lattice_table, plan.field_table, plan.image_table, step);
    if (step.last) break;
    blur<kVec>(run, plan.lattice_table, plan.field_table, static_cast<unsigned>(plan.fields.size()), plan.points,
               step.channels / kVec, options.has_bilateral ? 5 : 2, false);
  }
}

template <typename Run>
void mean_field(const Run& run, const CrfPlan& plan, const CrfOptions& options) {
  store(run, plan.lattices, plan.lattice_table);
  store(run, plan.fields, plan.field_table);
  store(run, plan.mass, plan.mass_table);
  store(run, plan.images, plan.image_table);
  const auto count = static_cast<unsigned>(plan.lattices.size());
  if (plan.spatial > 0) build<2>(run, plan.lattice_table, plan.spatial, plan.tiles, plan.points);
  if (plan.spatial < count) {
    build<5>(run, plan.lattice_table + plan.spatial, count - plan.spatial, plan.tiles, plan.points);
  }
  if (count > 0 && options.iterations > 0 && options.how != kNone) {
    filter<1>(run, plan.lattice_table, plan.mass_table, count, plan.tiles, plan.points, 1,
              options.has_bilateral ? 5 : 2, false, options.how == kSymmetric ? kRoot : kInverse);
  }
  const int32_t channels = plan.channels.channels;
  if (channels > kGroupMost) return iterate<4, kGroup / 4, true>(run, plan, options);
  switch (channels) {
    case 1: return iterate<1, 1, false>(run, plan, options);
    case 4: return iterate<4, 1, false>(run, plan, options);
    case 8: return iterate<4, 2, false>(run, plan, options);
    case 12: return iterate<4, 3, false>(run, plan, options);
    case 16: return iterate<4, 4, false>(run, plan, options);
    case 20: return iterate<4, 5, false>(run, plan, options);
    case 24: return iterate<4, 6, false>(run, plan, options);
    case 28: return iterate<4, 7, false>(run, plan, options);
    default: return iterate<4, 8, false>(run, plan, options);
  }
}

}  // namespace ribfast::cuda
