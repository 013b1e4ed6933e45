// dense_crf and dense_crf_labels on CUDA: kernels in dense_crf.cuh. Fields with one number of labels share launches, as
// many as fit into a quarter of the device's memory at their worst. Only where a `capacity` was given is the device
// asked for anything: whether it sufficed. Labels that dense_crf_labels does not have count as unsure: to refuse them
// would be to ask, too.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <map>
#include <vector>

#include "../backend.h"
#include "dense_crf.cuh"
#include "launch.h"

namespace ribfast::cuda {
namespace {

constexpr size_t kMostAtOnce = 16384;  // images: lattices and fields are a grid's second dimension

int64_t workspace_budget() {
  static const std::vector<int64_t> memory = [] {
    int count = 0;
    C10_CUDA_CHECK(cudaGetDeviceCount(&count));
    std::vector<int64_t> sizes(count);
    for (int i = 0; i < count; ++i) {
      cudaDeviceProp properties;
      C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, i));
      sizes[i] = static_cast<int64_t>(properties.totalGlobalMem);
    }
    return sizes;
  }();
  return memory[c10::cuda::current_device()] / 4;
}

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

CrfOptions check_options(const char* op, at::ArrayRef<double> gaussian, at::ArrayRef<double> bilateral,
                         int64_t iterations, int64_t normalization, bool exact, int64_t capacity) {
  check_crf_options(op, gaussian, bilateral, iterations, normalization, capacity);
  CrfOptions options{};
  options.has_gaussian = !gaussian.empty(), options.has_bilateral = !bilateral.empty();
  for (size_t i = 0; i < gaussian.size(); ++i) options.gaussian[i] = static_cast<float>(gaussian[i]);
  for (size_t i = 0; i < bilateral.size(); ++i) options.bilateral[i] = static_cast<float>(bilateral[i]);
  options.iterations = static_cast<int32_t>(iterations), options.how = static_cast<Normalization>(normalization);
  options.exact = exact, options.capacity = capacity, options.unsure = -1;
  return options;
}

// float32 must tell positions on the lattice apart; colours count as if the image had all of them.
void check_range(const char* op, const CrfOptions& options, int64_t height, int64_t width) {
  const auto reach = [&](int32_t dims, float space, float colour) {
    Lattice lattice{};
    describe(lattice, dims, 1, 1, 1, 0, true);
    double sum = 0;
    for (int32_t i = 0; i < dims; ++i) {
      const double largest = i == 0 ? (width - 1) / space : i == 1 ? (height - 1) / space : 255 / colour;
      sum += largest * lattice.scale[i] * (i + 1.0);
    }
    return sum / (dims + 1);
  };
  const double gaussian = options.has_gaussian ? reach(2, options.gaussian[0], 1) : 0;
  const double bilateral = options.has_bilateral ? reach(5, options.bilateral[0], options.bilateral[1]) : 0;
  RIBFAST_CHECK_VALUE(gaussian < 4e6 && bilateral < 4e6, op,
                      "larger standard deviations: positions on the lattice exceed what float32 tells apart",
                      "gaussian ", at::ArrayRef<float>(options.gaussian), ", bilateral ",
                      at::ArrayRef<float>(options.bilateral));
}

// Fields [begin, end), which have one number of labels.
void run_some(const char* op, const std::vector<CrfInput>& inputs, size_t begin, size_t end, const CrfOptions& options,
              const at::Tensor& like) {
  Arena arena;
  const CrfInput* first = inputs.data() + begin;
  const CrfPlan sizes = plan(first, end - begin, options, arena);
  RIBFAST_CHECK_VALUE(sizes.fits, op, "smaller images: corners are numbered in 31 bits", "one of ", sizes.points,
                      " pixels or more");
  const at::Tensor workspace = at::empty({arena.used}, like.options().dtype(at::kByte));
  arena = {static_cast<char*>(workspace.data_ptr())};
  const CrfPlan placed = plan(first, end - begin, options, arena);
  const OnStream run{c10::cuda::getCurrentCUDAStream()};
  mean_field(run, placed, options);
  if (options.capacity == 0 || placed.lattices.empty() || capturing(run.stream)) return;
  std::vector<int32_t> status(2 * placed.lattices.size());
  C10_CUDA_CHECK(cudaMemcpyAsync(status.data(), placed.statuses, status.size() * sizeof(int32_t),
                                 cudaMemcpyDeviceToHost, run.stream));
  C10_CUDA_CHECK(cudaStreamSynchronize(run.stream));
  for (size_t i = 0; i < placed.lattices.size(); ++i) {
    RIBFAST_CHECK_VALUE(status[2 * i + kOverflow] == 0, op,
                        "a capacity of as many vertices as a lattice has; raise it, or pass 0 for room that always "
                        "suffices",
                        options.capacity, ", which a lattice of ", placed.lattices[i].points, " pixels exceeds");
  }
}

void run_all(const char* op, const std::vector<CrfInput>& inputs, const CrfOptions& options, const at::Tensor& like) {
  std::map<int32_t, std::vector<CrfInput>> by_labels;
  for (const CrfInput& input : inputs) {
    check_range(op, options, input.height, input.width);
    by_labels[input.labels].push_back(input);
  }
  const int64_t budget = workspace_budget();
  for (const auto& [labels, same] : by_labels) {
    size_t begin = 0;
    int64_t used = 0;
    for (size_t i = 0; i < same.size(); ++i) {
      Arena alone;
      plan(&same[i], 1, options, alone);
      if (i > begin && (used + alone.used > budget || i - begin == kMostAtOnce)) {
        run_some(op, same, begin, i, options, like);
        begin = i, used = 0;
      }
      used += alone.used;
    }
    run_some(op, same, begin, same.size(), options, like);
  }
}

std::vector<at::Tensor> dense_crf(at::TensorList images, at::TensorList unary, at::ArrayRef<double> gaussian,
                                  at::ArrayRef<double> bilateral, int64_t iterations, int64_t normalization, bool exact,
                                  int64_t capacity) {
  const char* op = "dense_crf";
  RIBFAST_CHECK_VALUE(images.size() == unary.size(), op, "an image for each unary", images.size(), " and ",
                      unary.size());
  const CrfOptions options = check_options(op, gaussian, bilateral, iterations, normalization, exact, capacity);
  if (images.empty()) return {};
  const c10::cuda::CUDAGuard guard(images[0].device());
  std::vector<at::Tensor> results, kept;
  std::vector<CrfInput> inputs;
  for (size_t i = 0; i < images.size(); ++i) {
    check_crf_unary(op, images[i], unary[i]);
    check_same_device(op, images[0], images[i]);
    const at::Tensor image = images[i].contiguous(), energies = unary[i].to(at::kFloat).contiguous();
    kept.insert(kept.end(), {image, energies});
    results.push_back(at::empty(energies.sizes(), energies.options()));
    const int64_t labels = energies.size(-3), size = labels * image.size(0) * image.size(1);
    for (int64_t k = 0; k < problems_of(energies); ++k) {
      inputs.push_back({image.const_data_ptr<uint8_t>(), energies.const_data_ptr<float>() + k * size, nullptr,
                        results.back().mutable_data_ptr<float>() + k * size, nullptr, image.size(0), image.size(1),
                        static_cast<int32_t>(labels)});
    }
  }
  if (!inputs.empty()) run_all(op, inputs, options, images[0]);
  return results;
}

std::vector<at::Tensor> dense_crf_labels(at::TensorList images, at::TensorList labels, int64_t n_labels,
                                         double confidence, int64_t unsure, at::ArrayRef<double> gaussian,
                                         at::ArrayRef<double> bilateral, int64_t iterations, int64_t normalization,
                                         bool exact, int64_t capacity) {
  const char* op = "dense_crf_labels";
  RIBFAST_CHECK_VALUE(images.size() == labels.size(), op, "an image for each label map", images.size(), " and ",
                      labels.size());
  check_crf_confidence(op, n_labels, confidence);
  CrfOptions options = check_options(op, gaussian, bilateral, iterations, normalization, exact, capacity);
  options.unsure = unsure >= 0 && unsure <= 255 ? static_cast<int32_t>(unsure) : -1;
  if (n_labels > 1) {
    const double other = (1 - confidence) / static_cast<double>(n_labels - 1);
    options.gap = static_cast<float>(std::log(confidence) - std::log(other));
  }
  if (images.empty()) return {};
  const c10::cuda::CUDAGuard guard(images[0].device());
  std::vector<at::Tensor> results, kept;
  std::vector<CrfInput> inputs;
  for (size_t i = 0; i < images.size(); ++i) {
    check_crf_labels(op, images[i], labels[i]);
    check_same_device(op, images[0], images[i]);
    const at::Tensor image = images[i].contiguous(), given = labels[i].contiguous();
    kept.insert(kept.end(), {image, given});
    results.push_back(at::empty(given.sizes(), given.options()));
    const int64_t area = image.size(0) * image.size(1);
    for (int64_t k = 0; k < given.size(0); ++k) {
      inputs.push_back({image.const_data_ptr<uint8_t>(), nullptr, given.const_data_ptr<uint8_t>() + k * area, nullptr,
                        results.back().mutable_data_ptr<uint8_t>() + k * area, image.size(0), image.size(1),
                        static_cast<int32_t>(n_labels)});
    }
  }
  if (!inputs.empty()) run_all(op, inputs, options, images[0]);
  return results;
}

}  // namespace
}  // namespace ribfast::cuda

TORCH_LIBRARY_IMPL(ribfast, CUDA, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("dense_crf", &ribfast::cuda::dense_crf);
  m.impl("dense_crf_labels", &ribfast::cuda::dense_crf_labels);
}
