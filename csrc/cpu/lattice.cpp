// Lattices of any points on the CPU, as tensors: corners (tiles, d + 1, 16), weights alike, links, and where their
// segments begin, then the numbers of vertices and of points (lattice.h, permutohedral.h).
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include "../check.h"
#include "mean_field.h"

namespace ribfast::cpu {
namespace {

constexpr size_t kTensors = 4;

// A tensor over a buffer, which it keeps.
template <typename T>
at::Tensor adopted(Buffer<T>& memory, at::IntArrayRef shape, at::ScalarType type) {
  const auto kept = std::make_shared<Buffer<T>>(std::move(memory));
  return at::from_blob(kept->data(), shape, [kept](void*) {}, at::TensorOptions().dtype(type));
}

template <typename T>
at::Tensor copied(const std::vector<T>& numbers, at::ScalarType type) {
  const at::Tensor result = at::empty({static_cast<int64_t>(numbers.size())}, at::TensorOptions().dtype(type));
  std::copy(numbers.begin(), numbers.end(), result.template mutable_data_ptr<T>());
  return result;
}

std::vector<at::Tensor> lattice(const at::Tensor& features, bool filled) {
  const char* op = "lattice";
  check_float(op, "features", features);
  RIBFAST_CHECK_VALUE(features.dim() == 2 && features.size(1) >= 1 && features.size(1) <= kMaxDims &&
                          features.size(0) < (1 << 30),
                      op, "features (P, d) with d from 1 to 8 and fewer than 2^30 points", features.sizes());
  const int64_t points = features.size(0), dims = features.size(1);
  const at::Tensor planes = features.to(at::kFloat).t().contiguous();
  const float* from = planes.const_data_ptr<float>();
  std::vector<Permutohedral::Range> ranges(dims, {0, 0});
  for (int64_t d = 0; d < dims; ++d) {
    for (int64_t p = 0; p < points; ++p) {
      const float value = from[d * points + p];
      RIBFAST_CHECK_VALUE(std::isfinite(value), op, "finite features", value);
      ranges[d].low = std::min(ranges[d].low, value), ranges[d].high = std::max(ranges[d].high, value);
    }
  }
  try {
    const auto fill = [&](int64_t begin, int64_t end, float* out, int64_t stride) {
      for (int64_t d = 0; d < dims; ++d) std::copy_n(from + d * points + begin, end - begin, out + d * stride);
    };
    Permutohedral built(points, ranges, false, filled, kernels(), fill);
    const LatticeArrays arrays = built.arrays();
    std::vector<int64_t> segments = built.segments();
    const int64_t links = segments.back() + kLinksAhead;
    segments.insert(segments.end(), {arrays.vertices, points});
    const std::vector<int64_t> shape{arrays.tiles(), dims + 1, kTile};
    return {adopted(built.corners(), shape, at::kInt), adopted(built.weights(), shape, at::kFloat),
            adopted(built.links(), {links}, at::kInt), copied(segments, at::kLong)};
  } catch (const std::range_error& error) {
    RIBFAST_CHECK_VALUE(false, op, error.what(), "features from ", planes.min().item(), " to ", planes.max().item());
  } catch (const std::length_error& error) {
    RIBFAST_CHECK_VALUE(false, op, error.what(), points, " points");
  }
}

// Whether all are multiples of `step` in [0, end).
bool all_within(const int32_t* numbers, int64_t count, int32_t end, int32_t step) {
  uint32_t largest = 0, odd = 0;  // a negative one is large
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, static_cast<uint32_t>(numbers[i])), odd |= static_cast<uint32_t>(numbers[i]);
  }
  return count == 0 || (largest < static_cast<uint32_t>(end) && odd % static_cast<uint32_t>(step) == 0);
}

// The arrays of a lattice's tensors, once they are known to lead nowhere else in memory.
LatticeArrays check_lattice(const char* op, at::TensorList tensors) {
  const auto expect = [&](bool cond) {
    RIBFAST_CHECK_VALUE(cond, op, "the tensors that `lattice` returned", "others");
  };
  expect(tensors.size() == kTensors);
  for (const at::Tensor& t : tensors) expect(t.is_cpu() && t.is_contiguous());
  expect(tensors[0].scalar_type() == at::kInt && tensors[1].scalar_type() == at::kFloat &&
         tensors[2].scalar_type() == at::kInt && tensors[3].scalar_type() == at::kLong);
  expect(tensors[0].dim() == 3 && tensors[0].size(2) == kTile && tensors[1].sizes() == tensors[0].sizes());
  const int64_t dims = tensors[0].size(1) - 1;
  const int64_t count = (dims + 1) * kSegments;
  expect(dims >= 1 && dims <= kMaxDims && tensors[3].numel() == count + 3);
  const int64_t* segments = tensors[3].const_data_ptr<int64_t>();
  const int64_t vertices = segments[count + 1], points = segments[count + 2];
  expect(points >= 0 && tiles_of(points) == tensors[0].size(0) && vertices >= 1 && vertices <= kMostVertices);
  const int32_t* links = tensors[2].const_data_ptr<int32_t>();
  expect(segments[0] == 0 && segments[count] == tensors[2].numel() - kLinksAhead);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t size = segments[i + 1] - segments[i], segment = i % kSegments;
    expect(size >= 0 && segments[i + 1] <= segments[count]);
    if (segment + 1 < kSegments) {
      expect(size % (segment + 2) == 0);
    } else {
      expect(size == 0 || links[segments[i + 1] - 1] == 0);
    }
  }
  const int32_t* corners = tensors[0].const_data_ptr<int32_t>();
  expect(all_within(corners, tensors[0].numel(), static_cast<int32_t>(vertices) * kCornerScale, kCornerScale));
  expect(all_within(links, tensors[2].numel(), static_cast<int32_t>(vertices), 1));
  return {points, static_cast<int32_t>(dims), static_cast<int32_t>(vertices), corners,
          tensors[1].const_data_ptr<float>(), links, segments, nullptr, nullptr};
}

at::Tensor lattice_filter(const at::Tensor& values, at::TensorList lattice, bool transpose) {
  const char* op = "lattice_filter";
  const LatticeArrays arrays = check_lattice(op, lattice);
  check_float(op, "values", values);
  RIBFAST_CHECK_VALUE(values.is_cpu() && values.dim() == 2 && values.size(0) == arrays.points &&
                          values.size(1) < (1 << 24),
                      op, c10::str("values (", arrays.points, ", C) on the CPU, as the lattice's points are"),
                      values.sizes());
  const at::Tensor dense = values.to(at::kFloat).contiguous();
  const at::Tensor result = at::empty(dense.sizes(), dense.options());
  if (result.numel() > 0) {
    filter(arrays, dense.const_data_ptr<float>(), values.size(1), transpose, kernels(),
           result.mutable_data_ptr<float>());
  }
  return result.to(values.scalar_type());
}

// lattices: the tensors of each, in a row
at::Tensor mean_field(const at::Tensor& unary, at::TensorList lattices, at::ArrayRef<double> strengths,
                      at::IntArrayRef normalizations, int64_t iterations, bool exact) {
  const char* op = "mean_field";
  check_float(op, "unary", unary);
  RIBFAST_CHECK_VALUE(unary.is_cpu() && unary.dim() == 2 && unary.size(0) > 0 && unary.size(0) < (1 << 24), op,
                      "unary (L, P) on the CPU, L >= 1", unary.sizes());
  check_mean_field(op, lattices.size(), kTensors, strengths, normalizations, iterations);
  const Kernels& chosen = kernels_for(exact);
  const at::Tensor dense = unary.to(at::kFloat).contiguous();
  const at::Tensor result = at::empty(dense.sizes(), dense.options());
  MeanField crf;
  crf.points = unary.size(1), crf.labels = unary.size(0), crf.iterations = iterations, crf.exact = exact;
  crf.unary = dense.const_data_ptr<float>(), crf.probabilities = result.mutable_data_ptr<float>();
  std::vector<Buffer<float>> factors(strengths.size());
  for (size_t i = 0; i < strengths.size(); ++i) {
    const LatticeArrays arrays = check_lattice(op, lattices.slice(i * kTensors, kTensors));
    RIBFAST_CHECK_VALUE(arrays.points == crf.points, op, c10::str("lattices of ", crf.points, " points, as unary has"),
                        arrays.points);
    const auto how = static_cast<Normalization>(normalizations[i]);
    crf.terms.push_back({arrays, static_cast<float>(strengths[i]), how, nullptr});
    if (crf.points > 0) crf.terms.back().factor = normalize(arrays, how, chosen, factors[i]);
  }
  if (crf.points > 0) crf.run(chosen);
  return result;
}

}  // namespace
}  // namespace ribfast::cpu

TORCH_LIBRARY_IMPL(ribfast, CPU, m) {
  m.impl("lattice", &ribfast::cpu::lattice);
  m.impl("lattice_filter", &ribfast::cpu::lattice_filter);
  m.impl("mean_field", &ribfast::cpu::mean_field);
}
