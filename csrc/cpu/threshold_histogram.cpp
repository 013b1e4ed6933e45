// threshold_histogram on the CPU: strided maps are enlarged by accumulate_cams' kernel, a band of rows at a time, which
// stays in the cache, so the values are those that accumulate_cams would write. An image of up to kShare pixels is one
// thread's: callers share images among threads.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <limits>
#include <mutex>
#include <vector>

#include "../backend.h"
#include "../check.h"
#include "buffer.h"
#include "storage.h"
#include "taps.h"

namespace ribfast::cpu {
namespace {

constexpr int64_t kShare = 1 << 20;
constexpr int64_t kBandBytes = 1 << 17;  // a share of the second-level cache
constexpr int kIgnored = 255;

// Where a value lies among sorted thresholds (histogram.inl).
struct Cells {
  std::vector<float> cells, edges;
  float low = 0, scale = 0;
  int32_t steps = 0;

  explicit Cells(const at::Tensor& thresholds) {
    const auto count = static_cast<size_t>(thresholds.numel());
    const float* given = thresholds.const_data_ptr<float>();
    edges.assign(given, given + count);
    size_t n = 1;
    while (n < 8 * count && n < (size_t{1} << 16)) n *= 2;
    const float range = edges.back() - edges.front();
    low = edges.front();
    scale = range > 0 ? static_cast<float>(n) / range : 0.0f;
    if (!std::isfinite(scale)) scale = 0.0f;
    std::vector<int32_t> within(n, 0);
    for (const float edge : edges) {
      float position = (edge - low) * scale;  // as the kernel computes it
      position = position > 0 ? position : 0.0f;
      const float last = static_cast<float>(n - 1);
      ++within[static_cast<size_t>(position < last ? position : last)];
    }
    int32_t below = 0;
    for (const int32_t here : within) {
      cells.push_back(static_cast<float>(below));
      below += here;
      steps = std::max(steps, here);
    }
    edges.push_back(std::numeric_limits<float>::infinity());  // which no value exceeds
  }
};

at::Tensor threshold_histogram(const at::Tensor& maps_, const at::Tensor& mask_, const at::Tensor& thresholds_,
                               int64_t n_labels, int64_t stride) {
  check_threshold_histogram(maps_, mask_, thresholds_, n_labels, stride);
  const at::Tensor maps = (maps_.scalar_type() == at::kDouble ? maps_.to(at::kFloat) : maps_).contiguous();
  const at::Tensor mask = mask_.contiguous();
  const Cells cells(thresholds_.contiguous());
  const int64_t planes = maps.size(0), height = mask.size(0), width = mask.size(1);
  const int64_t bins = thresholds_.numel() + 1, row_bins = planes * bins;
  const at::Tensor result = at::zeros({n_labels, planes, bins}, maps.options().dtype(at::kLong));
  if (result.numel() == 0 || mask.numel() == 0) return result;

  int32_t label_rows[256];  // rows behind the labels': ignored pixels, and wrong labels
  for (int64_t label = 0; label < 256; ++label) {
    label_rows[label] = static_cast<int32_t>((label < n_labels ? label : n_labels + (label != kIgnored)) * row_bins);
  }
  const int64_t copy = (n_labels + 2) * row_bins + 16;  // apart by more than a power of two
  Taps rows, columns;
  const int64_t padded_width = ((width + kColumnBlock - 1) / kColumnBlock | 1) * kColumnBlock;
  if (stride > 1) {
    rows.fill<float>(height, height, maps.size(1), stride * maps.size(1));
    columns.fill<float>(width, padded_width, maps.size(2), stride * maps.size(2));
  }
  const int64_t band = std::clamp<int64_t>(kBandBytes / (planes * width * 4) / stride * stride, stride, 64 * stride);
  std::atomic<bool> whole{true}, right{true};
  std::mutex mutex;
  at::parallel_for(0, height, std::max<int64_t>(1, kShare / width), [&](int64_t begin, int64_t end) {
    Buffer<uint32_t> counts;
    Buffer<float> enlarged;
    Buffer<char> scratch;
    std::fill_n(counts.get(kHistogramCopies * copy), kHistogramCopies * copy, 0u);
    ThresholdRow row{planes,      height * width,          width,       bins,        cells.cells.data(),
                     cells.edges.data(), static_cast<int32_t>(cells.cells.size()), cells.low, cells.scale,
                     cells.steps, label_rows,              counts.data(), copy};
    const auto kernel = kernels().threshold_row[stride > 1 ? kFloat : storage_of(maps)];
    bool here = true;
    for (int64_t first = begin; first < end; first += band) {
      const int64_t count = std::min(band, end - first);
      if (stride > 1) {
        row.plane = count * width;
        float* out = enlarged.get(planes * band * width);
        const int64_t cells_of_map = maps.size(1) * maps.size(2);
        for (int64_t plane = 0; plane < planes; ++plane) {
          const CamScale scale{offset(maps, plane * cells_of_map),
                               0,
                               static_cast<int32_t>(maps.size(1)),
                               static_cast<int32_t>(maps.size(2)),
                               rows.cell.data() + first,
                               rows.t.data() + first * static_cast<int64_t>(sizeof(float)),
                               columns.cell.data(),
                               columns.t.data()};
          kernels().accumulate[storage_of(maps)](
              {&scale, 1, 0, count, width, padded_width, false,
               scratch.get(cam_scratch(1, padded_width, maps.size(2), sizeof(float)))},
              out + plane * row.plane, false);
        }
      }
      for (int64_t y = 0; y < count; ++y) {
        const void* at = stride > 1 ? static_cast<const void*>(enlarged.data() + y * width)
                                    : offset(maps, (first + y) * width);
        here &= kernel(row, at, mask.const_data_ptr<uint8_t>() + (first + y) * width);
      }
    }
    if (!here) whole = false;
    uint32_t* sums = counts.data();
    for (int64_t k = 1; k < kHistogramCopies; ++k) {
      for (int64_t i = 0; i < copy; ++i) sums[i] += sums[k * copy + i];
    }
    for (int64_t i = (n_labels + 1) * row_bins; i < (n_labels + 2) * row_bins; ++i) {
      if (sums[i] != 0) right = false;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    int64_t* out = result.data_ptr<int64_t>();
    for (int64_t i = 0; i < n_labels * row_bins; ++i) out[i] += sums[i];
  });
  RIBFAST_CHECK_VALUE(whole, "threshold_histogram", "maps without NaN", "some that hold it");
  RIBFAST_CHECK_VALUE(right, "threshold_histogram", c10::str("labels in the mask below ", n_labels, " or 255, ignored"),
                      "others; renumber the mask's labels");
  return result;
}

}  // namespace
}  // namespace ribfast::cpu

TORCH_LIBRARY_IMPL(ribfast, CPU, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("threshold_histogram", &ribfast::cpu::threshold_histogram);
}
