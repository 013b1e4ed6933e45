// How the kernels of erasing see attention and pixels. Free of torch.
#pragma once

#include <cstdint>

namespace ribfast::cpu {

// Rows of pixels with their channels, from the first row on; strides in elements.
struct PixelRows {
  char* at;  // null: no gradient of these
  int64_t channel_stride, row_stride, column_stride;
};

// The rows of pixels that lie between two rows of cells. What is not an integer is in accumulators: float, or double.
struct EraseStrip {
  const void *low, *high;  // attention at the cells; readable, with copies of the last, kColumnBlock + 1 beyond `cells`
  const void* row_t;       // of each row: (1 - t) low + t high
  const int32_t* cell;     // of each pixel of a row: it lies between the columns cell and cell + 1
  const void* column_t;    // like `cell` padded to `columns`; 0 at the last cell
  int64_t rows, width, columns, cells, channels;
  double sharpness, level;
  void* scratch;  // erase_scratch() accumulators
};

constexpr int64_t erase_scratch(int64_t columns) { return 4 * columns + 16; }  // 16: up to a cache line's boundary

}  // namespace ribfast::cpu
