// Mean field over lattices of any points: Q = softmax(-U + sum of strength * n K(n Q)).
//
// Layout: unary and probabilities (L, P); energies and Q [point][channels], channels beyond the labels have no
// probability. Kernels one after another through memory: what is said in dense_crf.cuh of images, and its speed, is not
// for these.
#pragma once

#include "lattice.cuh"

namespace ribfast::cuda {

struct PointEnergies {
  const float* unary;
  float *energies, *q, *probabilities;
  int64_t points;
  int32_t labels, channels;
  bool exact;
};

__global__ void __launch_bounds__(kTilePoints) energy_kernel(const PointEnergies job) {
  const int64_t point = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (point >= job.points) return;
  float* energies = job.energies + point * job.channels;
  for (int32_t c = 0; c < job.channels; ++c) {
    energies[c] = c < job.labels ? -__ldg(job.unary + c * job.points + point) : -INFINITY;
  }
}

// q = softmax(energies); the last one goes to the probabilities.
__global__ void __launch_bounds__(kTilePoints) softmax_kernel(const PointEnergies job, bool last) {
  const int64_t point = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (point >= job.points) return;
  const float* energies = job.energies + point * job.channels;
  float *q = job.q + point * job.channels, top = -INFINITY, sum = 0;
  for (int32_t c = 0; c < job.labels; ++c) top = energies[c] > top ? energies[c] : top;
  for (int32_t c = 0; c < job.channels; ++c) {
    q[c] = job.exact ? expf(energies[c] - top) : __expf(energies[c] - top);
    sum += q[c];
  }
  for (int32_t c = 0; c < job.channels; ++c) {
    q[c] /= sum;
    if (last && c < job.labels) job.probabilities[c * job.points + point] = q[c];
  }
}

// One lattice and how its filter enters the energies.
struct PointTerm {
  Lattice lattice;
  float strength;
  Normalization how;
};

struct PointPlan {
  std::vector<Lattice> lattices;
  std::vector<Field> fields, mass;
  PointEnergies job{};
  Lattice* lattice_table = nullptr;
  Field *field_table = nullptr, *mass_table = nullptr;
};

inline PointPlan plan(const std::vector<PointTerm>& terms, const PointEnergies& job, Arena& arena) {
  PointPlan plan;
  plan.job = job;
  plan.job.channels = job.labels == 1 ? 1 : (job.labels + 3) / 4 * 4;
  arena.take(plan.job.energies, job.points * plan.job.channels);
  arena.take(plan.job.q, job.points * plan.job.channels);
  arena.take(plan.lattice_table, static_cast<int64_t>(terms.size()));
  arena.take(plan.field_table, static_cast<int64_t>(terms.size()));
  arena.take(plan.mass_table, static_cast<int64_t>(terms.size()));
  for (const PointTerm& term : terms) {
    float* factor = nullptr;
    arena.take(factor, job.points);
    Field mass{}, field{};
    mass.lattice = field.lattice = static_cast<int32_t>(plan.lattices.size());
    mass.channels = 1, field.channels = plan.job.channels;
    take_field(mass, term.lattice, arena);
    take_field(field, term.lattice, arena);
    mass.output = factor;
    field.input = plan.job.q, field.output = plan.job.energies, field.strength = term.strength;
    field.before = term.how == kSymmetric || term.how == kBefore ? factor : nullptr;
    field.after = term.how == kSymmetric || term.how == kAfter ? factor : nullptr;
    plan.lattices.push_back(term.lattice), plan.mass.push_back(mass), plan.fields.push_back(field);
  }
  return plan;
}

template <int kVec, typename Run>
void iterate(const Run& run, const PointPlan& plan, int32_t iterations) {
  const auto count = static_cast<unsigned>(plan.lattices.size());
  const dim3 grid(static_cast<unsigned>((plan.job.points + kTilePoints - 1) / kTilePoints));
  int32_t dims = 0;
  for (const Lattice& lattice : plan.lattices) dims = std::max(dims, lattice.dims);
  iterations = count == 0 ? 0 : iterations;
  for (int32_t i = 0; i <= iterations; ++i) {
    run(energy_kernel, grid, kTilePoints, plan.job);
    for (unsigned k = 0; i > 0 && k < count; ++k) {  // they add to the same energies
      run(slice_kernel<kVec>, grid, kTilePoints, plan.lattice_table, plan.field_table + k, kAdd);
    }
    run(softmax_kernel, grid, kTilePoints, plan.job, i == iterations);
    if (i == iterations) break;
    run(splat_kernel<kVec>, dim3(grid.x, count), kTilePoints, plan.lattice_table, plan.field_table);
    blur<kVec>(run, plan.lattice_table, plan.field_table, count, plan.job.points, plan.job.channels / kVec, dims,
               false);
  }
}

template <typename Run>
void mean_field(const Run& run, const PointPlan& plan, const std::vector<PointTerm>& terms, int32_t iterations) {
  store(run, plan.lattices, plan.lattice_table);
  store(run, plan.fields, plan.field_table);
  store(run, plan.mass, plan.mass_table);
  for (size_t k = 0; k < terms.size(); ++k) {
    if (terms[k].how == kNone) continue;
    const Lattice& lattice = terms[k].lattice;
    filter<1>(run, plan.lattice_table, plan.mass_table + k, 1, lattice.tiles, lattice.points, 1, lattice.dims, false,
              terms[k].how == kSymmetric ? kRoot : kInverse);
  }
  if (plan.job.channels == 1) return iterate<1>(run, plan, iterations);
  iterate<4>(run, plan, iterations);
}

}  // namespace ribfast::cuda
