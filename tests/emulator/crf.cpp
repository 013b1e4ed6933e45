// The lattice's and the CRF's kernels behind C functions, in the sequences that csrc/cuda/*.cu runs them in, on memory
// that is filled with 0xff as the device's might be.
#include "cuda_on_cpu.h"

#include "../../csrc/cuda/dense_crf.cuh"
#include "../../csrc/cuda/mean_field.cuh"

using namespace ribfast::cuda;

namespace {

struct InTurn {
  unsigned order;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, unsigned threads, const Arguments&... arguments) const {
    emulator::launch(grid, threads, order, [&] { kernel(arguments...); });
  }
};

struct Memory {
  std::vector<char> bytes;
  Arena arena;

  explicit Memory(int64_t size) : bytes(size + 256, static_cast<char>(0xff)) {
    arena.base = bytes.data() + (256 - reinterpret_cast<uintptr_t>(bytes.data()) % 256) % 256;
  }
};

}  // namespace

extern "C" {

// Builds the lattice of features [point][dim] and filters values [point][channel] over it. Returns the number of
// vertices, or -1 where they exceed the capacity. corners, weights, neighbours: as lattice() returns them.
int32_t filter(unsigned order, const float* features, int64_t points, int32_t dims, bool filled, int64_t capacity,
               const float* values, int32_t channels, bool transposed, int32_t* corners, float* weights,
               int32_t* neighbours, float* result) {
  const InTurn run{order};
  Lattice lattice{};
  if (!describe(lattice, dims, points, 0, 0, capacity, filled)) return -2;
  Field field{};
  field.channels = channels;
  const auto place = [&](Arena& arena) {
    arena.take(lattice.status, 2);
    take_tables(lattice, arena);
    take_scratch(lattice, arena);
    take_field(field, lattice, arena);
  };
  Arena sizes;
  place(sizes);
  Memory memory(sizes.used);
  place(memory.arena);
  lattice.features = features, lattice.weights = weights, lattice.neighbours = neighbours;
  field.input = values, field.output = result;
  build_of_dims(run, &lattice, dims, 1, lattice.tiles, points);
  run(corners_kernel, dim3(lattice.tiles), kTilePoints, &lattice, corners);
  if (channels % 4 == 0) {
    filter<4>(run, &lattice, &field, 1, lattice.tiles, points, channels, dims, transposed, kPlain);
  } else {
    filter<1>(run, &lattice, &field, 1, lattice.tiles, points, channels, dims, transposed, kPlain);
  }
  return lattice.status[kOverflow] ? -1 : lattice.status[kVertices];
}

// Mean fields of images with one number of labels; unary, probabilities or given, chosen may be null.
// sizes: H, W of each; gaussian: 2 numbers or null, bilateral: 3 or null. Returns whether a lattice overflowed.
bool dense_crf(unsigned order, int32_t count, const uint8_t** images, const float** unary, const uint8_t** given,
               float** probabilities, uint8_t** chosen, const int64_t* sizes, int32_t labels, const float* gaussian,
               const float* bilateral, int32_t iterations, int32_t how, bool exact, int64_t capacity, float gap,
               int32_t unsure) {
  CrfOptions options{};
  options.has_gaussian = gaussian != nullptr, options.has_bilateral = bilateral != nullptr;
  if (gaussian != nullptr) std::copy(gaussian, gaussian + 2, options.gaussian);
  if (bilateral != nullptr) std::copy(bilateral, bilateral + 3, options.bilateral);
  options.iterations = iterations, options.how = static_cast<Normalization>(how), options.exact = exact;
  options.capacity = capacity, options.gap = gap, options.unsure = unsure;
  std::vector<CrfInput> inputs;
  for (int i = 0; i < count; ++i) {
    inputs.push_back({images[i], unary == nullptr ? nullptr : unary[i], given == nullptr ? nullptr : given[i],
                      probabilities == nullptr ? nullptr : probabilities[i], chosen == nullptr ? nullptr : chosen[i],
                      sizes[2 * i], sizes[2 * i + 1], labels});
  }
  Arena needed;
  plan(inputs.data(), inputs.size(), options, needed);
  Memory memory(needed.used);
  const CrfPlan placed = plan(inputs.data(), inputs.size(), options, memory.arena);
  mean_field(InTurn{order}, placed, options);
  bool overflow = false;
  for (size_t i = 0; i < placed.lattices.size(); ++i) overflow |= placed.statuses[2 * i + kOverflow] != 0;
  return overflow;
}

// Mean field of points under `count` terms, features [point][dim] of each; unary and probabilities (L, P).
void mean_field(unsigned order, int32_t count, const float** features, const int32_t* dims, int64_t points,
                const float* unary, int32_t labels, const float* strengths, const int32_t* how, int32_t iterations,
                bool exact, float* probabilities) {
  const InTurn run{order};
  std::vector<PointTerm> terms(count);
  const auto place = [&](Arena& arena) {
    for (int i = 0; i < count; ++i) {
      Lattice& lattice = terms[i].lattice;
      arena.take(lattice.status, 2);
      arena.take(lattice.weights, int64_t{lattice.padded} * (dims[i] + 1));
      arena.take(lattice.neighbours, 2 * (lattice.capacity + int64_t{1}) * (dims[i] + 1));
      take_tables(lattice, arena);
      take_scratch(lattice, arena);
    }
  };
  for (int i = 0; i < count; ++i) {
    describe(terms[i].lattice, dims[i], points, 0, 0, 0, false);
    terms[i].lattice.features = features[i];
    terms[i].strength = strengths[i], terms[i].how = static_cast<Normalization>(how[i]);
  }
  Arena sizes;
  place(sizes);
  Memory tables(sizes.used);
  place(tables.arena);
  for (const PointTerm& term : terms) {
    build_of_dims(run, &term.lattice, term.lattice.dims, 1, term.lattice.tiles, points);
  }
  PointEnergies job{};
  job.unary = unary, job.probabilities = probabilities, job.points = points, job.labels = labels, job.exact = exact;
  Arena needed;
  plan(terms, job, needed);
  Memory memory(needed.used);
  mean_field(run, plan(terms, job, memory.arena), terms, iterations);
}

}  // extern "C"
