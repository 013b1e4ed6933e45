// lattice and lattice_filter on CUDA: kernels in lattice.cuh. There is room for as many vertices as there can be, so
// that nothing has to be asked of the device.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "../backend.h"
#include "lattice.cuh"
#include "launch.h"

namespace ribfast::cuda {
namespace {

constexpr const char* kLattice = "lattice";
constexpr const char* kFilter = "lattice_filter";

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

std::vector<at::Tensor> lattice(const at::Tensor& features) {
  check_float(kLattice, "features", features);
  RIBFAST_CHECK_VALUE(features.dim() == 2 && features.size(1) >= 1 && features.size(1) <= kMaxDims, kLattice,
                      "features (P, d) with d from 1 to 8", features.sizes());
  const c10::cuda::CUDAGuard guard(features.device());
  const int64_t points = features.size(0), corners = features.size(1) + 1;
  const auto dims = static_cast<int32_t>(features.size(1));
  const at::Tensor dense = features.to(at::kFloat).contiguous();
  Lattice lattice{};
  RIBFAST_CHECK_VALUE(describe(lattice, dims, points, 0, 0, 0), kLattice,
                      "fewer points: corners are numbered in 31 bits", points);
  const auto integers = dense.options().dtype(at::kInt);
  const at::Tensor corner = at::empty({(points + 15) / 16, corners, 16}, integers);
  const at::Tensor weights = at::empty({(points + 15) / 16, corners, 16}, dense.options());
  if (points == 0) return {corner, weights, at::zeros({corners, 1, 2}, integers), empty_bytes(0, features)};
  const at::Tensor neighbours = at::empty({corners, points * corners + 1, 2}, integers);
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
  check_float(kFilter, "values", values);
  RIBFAST_CHECK_VALUE(values.dim() == 2, kFilter, "values (P, C)", values.sizes());
  RIBFAST_CHECK_VALUE(given.size() == 4 && given[1].dim() == 3 && given[2].dim() == 3 &&
                          given[2].size(0) == given[1].size(1),
                      kFilter, "what lattice() returned on this device", given.size(), " tensors");
  for (const at::Tensor& t : given) check_same_device(kFilter, values, t);
  const int64_t points = values.size(0), corners = given[1].size(1), channels = values.size(1);
  RIBFAST_CHECK_VALUE(given[2].size(1) == points * corners + 1, kFilter, "a value for each of the lattice's points",
                      points, " for ", (given[2].size(1) - 1) / std::max<int64_t>(corners, 1));
  const c10::cuda::CUDAGuard guard(values.device());
  const at::Tensor dense = values.to(at::kFloat).contiguous(), result = at::empty(dense.sizes(), dense.options());
  if (values.numel() == 0) return result.to(values.scalar_type());
  Lattice lattice{};
  RIBFAST_CHECK_VALUE(corners >= 2 && corners <= kMaxDims + 1 && channels < (int64_t{1} << 31) &&
                          describe(lattice, static_cast<int32_t>(corners - 1), points, 0, 0, 0) &&
                          given[3].numel() == place_tables(lattice, nullptr),
                      kFilter, "what lattice() returned on this device", "tables of ", given[3].numel(), " bytes");
  place_tables(lattice, static_cast<char*>(given[3].data_ptr()));
  lattice.weights = static_cast<float*>(given[1].data_ptr());
  lattice.neighbours = static_cast<int32_t*>(given[2].data_ptr());
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

}  // namespace
}  // namespace ribfast::cuda

TORCH_LIBRARY_IMPL(ribfast, CUDA, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("lattice", &ribfast::cuda::lattice);
  m.impl("lattice_filter", &ribfast::cuda::lattice_filter);
}
