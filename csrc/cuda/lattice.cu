// lattice, lattice_filter and mean_field on CUDA: kernels in lattice.cuh and mean_field.cuh. There is room for as many
// vertices as there can be, so that nothing has to be asked of the device.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "../backend.h"
#include "launch.h"
#include "mean_field.cuh"

namespace ribfast::cuda {
namespace {

constexpr size_t kTensors = 4;  // of a lattice: corners, weights, neighbours, tables

at::Tensor empty_bytes(int64_t size, const at::Tensor& like) {
  return at::empty({size}, like.options().dtype(at::kByte));
}

// The lattice of `points` points, its tables in `tables` (or, where that is null, no more than their size).
int64_t place_tables(Lattice& lattice, char* tables) {
  Arena arena{tables};
  take_tables(lattice, arena);
  arena.take(lattice.status, 2);
  return arena.used;
}

// The lattice that the tensors hold, which must be one of `points` points.
Lattice read_lattice(const char* op, at::TensorList tensors, int64_t points, const at::Tensor& like) {
  const auto expect = [&](bool cond) {
    RIBFAST_CHECK_VALUE(cond, op, "the tensors that `lattice` returned on this device", "others");
  };
  expect(tensors.size() == kTensors);
  for (const at::Tensor& t : tensors) expect(t.device() == like.device() && t.is_contiguous());
  expect(tensors[1].scalar_type() == at::kFloat && tensors[2].scalar_type() == at::kInt &&
         tensors[3].scalar_type() == at::kByte && tensors[1].dim() == 3 && tensors[2].dim() == 3);
  const int64_t corners = tensors[1].size(1);
  expect(corners >= 2 && corners <= kMaxDims + 1 && tensors[2].size(0) == corners && tensors[2].size(2) == 2);
  const int64_t vertices = tensors[2].size(1) - 1;
  const bool filled = vertices == (points + 1) * corners;
  RIBFAST_CHECK_VALUE(filled || vertices == points * corners, op, "as many points as the lattice has",
                      points, " for ", vertices / corners);
  Lattice lattice{};
  expect(tensors[1].numel() == (points + 15) / 16 * corners * 16 &&
         describe(lattice, static_cast<int32_t>(corners - 1), points, 0, 0, 0, filled) &&
         (points == 0 || tensors[3].numel() == place_tables(lattice, nullptr)));
  place_tables(lattice, static_cast<char*>(tensors[3].data_ptr()));
  lattice.weights = static_cast<float*>(tensors[1].data_ptr());
  lattice.neighbours = static_cast<int32_t*>(tensors[2].data_ptr());
  return lattice;
}

std::vector<at::Tensor> lattice(const at::Tensor& features, bool filled) {
  const char* op = "lattice";
  check_float(op, "features", features);
  RIBFAST_CHECK_VALUE(features.dim() == 2 && features.size(1) >= 1 && features.size(1) <= kMaxDims, op,
                      "features (P, d) with d from 1 to 8", features.sizes());
  const c10::cuda::CUDAGuard guard(features.device());
  const int64_t points = features.size(0), corners = features.size(1) + 1;
  const auto dims = static_cast<int32_t>(features.size(1));
  const at::Tensor dense = features.to(at::kFloat).contiguous();
  Lattice lattice{};
  RIBFAST_CHECK_VALUE(describe(lattice, dims, points, 0, 0, 0, filled), op,
                      "fewer points: corners are numbered in 31 bits", points);
  const auto integers = dense.options().dtype(at::kInt);
  const at::Tensor corner = at::empty({(points + 15) / 16, corners, 16}, integers);
  const at::Tensor weights = at::empty({(points + 15) / 16, corners, 16}, dense.options());
  if (points == 0) return {corner, weights, at::zeros({corners, 1, 2}, integers), empty_bytes(0, features)};
  const at::Tensor neighbours = at::empty({corners, lattice.capacity + int64_t{1}, 2}, integers);
  const at::Tensor tables = empty_bytes(place_tables(lattice, nullptr), features);
  Arena scratch;
  Lattice* table = nullptr;
  scratch.take(table, 1);
  take_scratch(lattice, scratch);
  const at::Tensor workspace = empty_bytes(scratch.used, features);
  scratch = {static_cast<char*>(workspace.data_ptr())};
  scratch.take(table, 1);
  take_scratch(lattice, scratch);
  place_tables(lattice, static_cast<char*>(tables.data_ptr()));
  lattice.features = dense.const_data_ptr<float>();
  lattice.weights = weights.mutable_data_ptr<float>();
  lattice.neighbours = neighbours.mutable_data_ptr<int32_t>();
  const OnStream run{c10::cuda::getCurrentCUDAStream()};
  store(run, std::vector<Lattice>{lattice}, table);
  build_of_dims(run, table, dims, 1, lattice.tiles, points);
  run(corners_kernel, dim3(lattice.tiles), kTilePoints, table, corner.mutable_data_ptr<int32_t>());
  return {corner, weights, neighbours, tables};
}

at::Tensor lattice_filter(const at::Tensor& values, at::TensorList given, bool transpose) {
  const char* op = "lattice_filter";
  check_float(op, "values", values);
  RIBFAST_CHECK_VALUE(values.dim() == 2 && values.size(1) < (1 << 19), op, "values (P, C), C below 2^19",
                      values.sizes());
  const c10::cuda::CUDAGuard guard(values.device());
  const int64_t points = values.size(0), channels = values.size(1);
  const Lattice lattice = read_lattice(op, given, points, values);
  const at::Tensor dense = values.to(at::kFloat).contiguous(), result = at::empty(dense.sizes(), dense.options());
  if (values.numel() == 0) return result.to(values.scalar_type());
  Field field{};
  field.channels = static_cast<int32_t>(channels);
  Lattice* lattice_table = nullptr;
  Field* field_table = nullptr;
  const auto place = [&](char* base) {
    Arena arena{base};
    arena.take(lattice_table, 1);
    arena.take(field_table, 1);
    take_field(field, lattice, arena);
    return arena.used;
  };
  const at::Tensor workspace = empty_bytes(place(nullptr), values);
  place(static_cast<char*>(workspace.data_ptr()));
  field.input = dense.const_data_ptr<float>(), field.output = result.mutable_data_ptr<float>();
  const OnStream run{c10::cuda::getCurrentCUDAStream()};
  store(run, std::vector<Lattice>{lattice}, lattice_table);
  store(run, std::vector<Field>{field}, field_table);
  with_vector<float>(vector_width<float>(channels, field.input, field.output), [&](auto vec) {
    filter<vec.value>(run, lattice_table, field_table, 1, lattice.tiles, points, field.channels, lattice.dims,
                      transpose, kPlain);
  });
  return result.to(values.scalar_type());
}

// lattices: the tensors of each, in a row
at::Tensor mean_field_of_points(const at::Tensor& unary, at::TensorList lattices, at::ArrayRef<double> strengths,
                      at::IntArrayRef normalizations, int64_t iterations, bool exact) {
  const char* op = "mean_field";
  check_float(op, "unary", unary);
  RIBFAST_CHECK_VALUE(unary.dim() == 2 && unary.size(0) > 0 && unary.size(0) < (1 << 19), op, "unary (L, P), L >= 1",
                      unary.sizes());
  check_mean_field(op, lattices.size(), kTensors, strengths, normalizations, iterations);
  const c10::cuda::CUDAGuard guard(unary.device());
  const at::Tensor dense = unary.to(at::kFloat).contiguous(), result = at::empty(dense.sizes(), dense.options());
  std::vector<PointTerm> terms;
  for (size_t i = 0; i < strengths.size(); ++i) {
    terms.push_back({read_lattice(op, lattices.slice(i * kTensors, kTensors), unary.size(1), unary),
                     static_cast<float>(strengths[i]), static_cast<Normalization>(normalizations[i])});
  }
  if (result.numel() == 0) return result;
  PointEnergies job{};
  job.unary = dense.const_data_ptr<float>(), job.probabilities = result.mutable_data_ptr<float>();
  job.points = unary.size(1), job.labels = static_cast<int32_t>(unary.size(0)), job.exact = exact;
  Arena arena;
  plan(terms, job, arena);
  const at::Tensor workspace = empty_bytes(arena.used, unary);
  arena = {static_cast<char*>(workspace.data_ptr())};
  mean_field(OnStream{c10::cuda::getCurrentCUDAStream()}, plan(terms, job, arena), terms,
             static_cast<int32_t>(iterations));
  return result;
}

}  // namespace
}  // namespace ribfast::cuda

TORCH_LIBRARY_IMPL(ribfast, CUDA, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("lattice", &ribfast::cuda::lattice);
  m.impl("lattice_filter", &ribfast::cuda::lattice_filter);
  m.impl("mean_field", &ribfast::cuda::mean_field_of_points);
}
