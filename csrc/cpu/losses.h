// How the kernels of a segmentation's losses see logits and pixels. Free of torch.
#pragma once

#include <cstdint>

namespace ribfast::cpu {

// One row of pixels and the two rows of logits that it lies between. A row of logits holds `columns` + 1 columns, the
// last one twice, of `padded` labels each: a multiple of the tier's lanes.
struct LossRow {
  const float *low, *high;
  float t;              // of the row: (1 - t) low + t high
  const int32_t* cell;  // of each pixel: it lies between the columns cell and cell + 1
  const float* column_t;
  const uint8_t* labels;
  int64_t width, columns, padded;
  int32_t n_labels;
  float* scratch;  // loss_scratch() floats
};

constexpr int64_t loss_scratch(int64_t width, int64_t columns, int64_t padded) {
  return (columns + 1) * padded + 6 * (width + 16);  // 16: lanes of the widest vector
}

// What becomes of losses (math.h: Fit), and its parameter.
struct LossFit {
  int32_t how;
  float k;
};

}  // namespace ribfast::cpu
