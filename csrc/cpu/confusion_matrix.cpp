// confusion_matrix on the CPU: one pass, four histograms in turn, so that equal neighbours do not wait for one
// another. Label maps of any strides (copied where not contiguous).
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../backend.h"
#include "../check.h"
#include "buffer.h"
#include "kernels.h"

namespace ribfast::cpu {
namespace {

constexpr int kIgnored = 255;

at::Tensor confusion_matrix(const at::Tensor& labels_, const at::Tensor& mask_, int64_t n_labels) {
  check_confusion_matrix(labels_, mask_, n_labels);
  const at::Tensor labels = labels_.contiguous(), mask = mask_.contiguous();
  const int64_t side = n_labels + 1, copy = (n_labels + 2) * side + 16;  // wrong labels count too, behind the others
  int32_t row_of[256], column_of[256];
  for (int64_t label = 0; label < 256; ++label) {
    column_of[label] = static_cast<int32_t>(std::min(label, n_labels));
    row_of[label] = static_cast<int32_t>((label < n_labels ? label : n_labels + (label != kIgnored)) * side);
  }
  Buffer<uint32_t> counts;
  uint32_t* sums = counts.get(kHistogramCopies * copy);
  std::fill_n(sums, kHistogramCopies * copy, 0u);
  const uint8_t *predicted = labels.const_data_ptr<uint8_t>(), *true_ = mask.const_data_ptr<uint8_t>();
  const int64_t pixels = mask.numel();
  int64_t i = 0;
  for (; i + kHistogramCopies <= pixels; i += kHistogramCopies) {
    for (int64_t k = 0; k < kHistogramCopies; ++k) {
      ++sums[k * copy + row_of[true_[i + k]] + column_of[predicted[i + k]]];
    }
  }
  for (; i < pixels; ++i) ++sums[row_of[true_[i]] + column_of[predicted[i]]];
  for (int64_t k = 1; k < kHistogramCopies; ++k) {
    for (int64_t j = 0; j < copy; ++j) sums[j] += sums[k * copy + j];
  }
  uint32_t wrong_labels = 0, wrong_mask = 0;
  for (int64_t row = 0; row < n_labels + 2; ++row) wrong_labels |= sums[row * side + n_labels];
  for (int64_t column = 0; column < side; ++column) wrong_mask |= sums[(n_labels + 1) * side + column];
  RIBFAST_CHECK_VALUE(wrong_labels == 0, "confusion_matrix", c10::str("labels below ", n_labels),
                      "others; renumber them");
  RIBFAST_CHECK_VALUE(wrong_mask == 0, "confusion_matrix",
                      c10::str("labels in the mask below ", n_labels, " or 255, ignored"),
                      "others; renumber the mask's labels");
  const at::Tensor result = at::zeros({n_labels, n_labels}, mask.options().dtype(at::kLong));
  int64_t* out = result.data_ptr<int64_t>();
  for (int64_t row = 0; row < n_labels; ++row) {
    for (int64_t column = 0; column < n_labels; ++column) out[row * n_labels + column] = sums[row * side + column];
  }
  return result;
}

}  // namespace
}  // namespace ribfast::cpu

TORCH_LIBRARY_IMPL(ribfast, CPU, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("confusion_matrix", &ribfast::cpu::confusion_matrix);
}
