// erase on the CPU: threads over maps and the rows of pixels between two rows of cells, whose gradients each such strip
// has for itself: results do not depend on the threads. Images and gradients of images are read as they are where they
// are contiguous or channels last, else copied; maps are copied, small as they are. An image's pixels are read once and
// written once; nothing of their size is allocated beside the result.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "../backend.h"
#include "../check.h"
#include "buffer.h"
#include "storage.h"
#include "taps.h"

namespace ribfast::cpu {
namespace {

// Where the pixels of rows, or of columns, lie between cells. Beyond the last cell both taps are that cell.
template <typename S>
struct Axis {
  int64_t count, cells, padded;
  std::vector<int64_t> first;       // pixel of each cell, between it and the next; then the end
  std::vector<int64_t> candidates;  // each cell's first and last pixel: attention, linear there, has its extremes so
  Taps taps;

  Axis(int64_t count_, int64_t cells_)
      : count(count_), cells(cells_), padded((count + kColumnBlock - 1) / kColumnBlock * kColumnBlock),
        first(cells + 1) {
    taps.fill<S>(count, padded, cells, count);
    for (int64_t i = 0; i < padded; ++i) {
      if (taps.cell[i] == cells - 1) t()[i] = 0;
    }
    for (int64_t pixel = 0, cell = 0; cell <= cells; ++cell) {
      while (pixel < count && taps.cell[pixel] < cell) ++pixel;
      first[cell] = pixel;
    }
    for (int64_t cell = 0; cell < cells; ++cell) {
      if (first[cell] < first[cell + 1]) candidates.push_back(first[cell]);
      if (first[cell] + 1 < first[cell + 1]) candidates.push_back(first[cell + 1] - 1);
    }
  }
  S* t() { return reinterpret_cast<S*>(taps.t.data()); }
  const S* t() const { return reinterpret_cast<const S*>(taps.t.data()); }
  int64_t next(int64_t cell) const { return std::min(cell + 1, cells - 1); }
};

// The least and the largest pixel of an enlarged map, and where they are.
template <typename S>
struct Extremes {
  S low, high;
  int64_t low_at[2], high_at[2];

  bool rounding() const { return high - low <= S(1e-5) * high; }
};

template <typename S>
S rectified(S x) { return x < 0 ? S(0) : x; }  // NaN stays

template <typename S>
class Erasing {
 public:
  Erasing(const at::Tensor& images, const at::Tensor& maps, const at::Tensor& which, double sharpness, double level)
      : images_(dense_pixels(images)), maps_(maps.to(at::CppTypeToScalarType<S>::value).contiguous()),
        which_(which.contiguous()), sharpness_(sharpness), level_(level), y_(images.size(2), maps.size(1)),
        x_(images.size(3), maps.size(2)), extremes_(maps.size(0)) {
    for (int64_t map = 0; map < maps.size(0); ++map) {
      const int64_t image = which_.const_data_ptr<int64_t>()[map];
      RIBFAST_CHECK_VALUE(image >= 0 && image < images.size(0), "erase",
                          c10::str("which from 0 to ", images.size(0) - 1), image, "; number the images from 0");
    }
    attention_.get(strips() * row_size());
    at::parallel_for(0, maps.size(0), cpu::grain(4 * y_.candidates.size() * x_.candidates.size()),
                     [&](int64_t begin, int64_t end) {
                       std::vector<S> row(x_.cells);
                       for (int64_t map = begin; map < end; ++map) {
                         extremes_[map] = find(map, row.data());
                         attend(map);
                       }
                     });
  }

  // Strip i: the rows of pixels between row i % height of map i / height and the next, or beyond the last.
  int64_t strips() const { return maps_.numel() / x_.cells; }
  int64_t cell_rows() const { return y_.cells; }
  int64_t cells() const { return x_.cells; }
  int64_t grain() const { return cpu::grain(y_.count * x_.count * (images_.size(1) + 4) / y_.cells); }
  const at::Tensor& images() const { return images_; }
  const Extremes<S>& extremes(int64_t map) const { return extremes_[map]; }
  const S* map(int64_t i) const { return maps_.template const_data_ptr<S>() + i * y_.cells * x_.cells; }
  const S* attention(int64_t map, int64_t row) const { return attention_.data() + (map * y_.cells + row) * row_size(); }

  EraseStrip strip(int64_t i, Buffer<S>& scratch) const {
    const int64_t map = i / y_.cells, cell = i % y_.cells, row = y_.first[cell];
    return {attention(map, cell), attention(map, y_.next(cell)), y_.t() + row, x_.taps.cell.data(), x_.t(),
            y_.first[cell + 1] - row, x_.count, x_.padded, x_.cells, images_.size(1), sharpness_, level_,
            scratch.get(erase_scratch(x_.padded))};
  }
  // The strip's rows in image `image` of `pixels`.
  PixelRows rows(const at::Tensor& pixels, int64_t image, int64_t i) const {
    const int64_t row = y_.first[i % y_.cells], channels = pixels.size(1);
    const int64_t column_stride = is_interleaved(pixels) ? channels : 1;
    const int64_t channel_stride = is_interleaved(pixels) ? 1 : y_.count * x_.count;
    const int64_t row_stride = x_.count * column_stride;
    return {offset(pixels, image * channels * y_.count * x_.count + row * row_stride), channel_stride, row_stride,
            column_stride};
  }
  PixelRows image_rows(int64_t i) const { return rows(images_, which_.const_data_ptr<int64_t>()[i / y_.cells], i); }

  // Calls f(row, column, weight) with the cells of a pixel.
  template <typename F>
  void each_cell(const int64_t* pixel, F&& f) const {
    const int64_t row = y_.taps.cell[pixel[0]], column = x_.taps.cell[pixel[1]];
    const S t = y_.t()[pixel[0]], s = x_.t()[pixel[1]];
    f(row, column, (1 - t) * (1 - s)), f(row, x_.next(column), (1 - t) * s);
    f(y_.next(row), column, t * (1 - s)), f(y_.next(row), x_.next(column), t * s);
  }

 private:
  int64_t row_size() const { return x_.cells + kColumnBlock + 1; }

  Extremes<S> find(int64_t map_, S* row) const {
    const S* cells = map(map_);
    Extremes<S> found{INFINITY, -INFINITY, {0, 0}, {0, 0}};
    bool nan = false;
    for (const int64_t y : y_.candidates) {
      const S *low = cells + y_.taps.cell[y] * x_.cells, *high = cells + y_.next(y_.taps.cell[y]) * x_.cells;
      const S t = y_.t()[y];
      for (int64_t x = 0; x < x_.cells; ++x) {
        const S first = rectified(low[x]);
        row[x] = (1 - t) * first + t * rectified(high[x]);
      }
      for (const int64_t x : x_.candidates) {
        const int64_t cell = x_.taps.cell[x];
        const S s = x_.t()[x], value = (1 - s) * row[cell] + s * row[x_.next(cell)];
        nan |= value != value;
        if (value < found.low) found.low = value, found.low_at[0] = y, found.low_at[1] = x;
        if (value > found.high) found.high = value, found.high_at[0] = y, found.high_at[1] = x;
      }
    }
    if (nan) found.low = found.high = NAN;
    return found;
  }

  // Attention at the cells: what lies between them is theirs, enlarged.
  void attend(int64_t map_) {
    const Extremes<S>& found = extremes_[map_];
    const S* cells = map(map_);
    for (int64_t y = 0; y < y_.cells; ++y) {
      S* row = attention_.data() + (map_ * y_.cells + y) * row_size();
      for (int64_t x = 0; x < row_size(); ++x) {
        const S cell = rectified(cells[y * x_.cells + std::min(x, x_.cells - 1)]);
        row[x] = found.rounding() ? S(0) : (cell - found.low) / (found.high - found.low);
      }
    }
  }

  at::Tensor images_, maps_, which_;
  double sharpness_, level_;
  Axis<S> y_, x_;
  std::vector<Extremes<S>> extremes_;
  Buffer<S> attention_;
};

template <typename S>
std::tuple<at::Tensor, at::Tensor> erase_in(const at::Tensor& images, const at::Tensor& maps, const at::Tensor& which,
                                            double sharpness, double level) {
  const Erasing<S> given(images, maps, which, sharpness, level);
  const at::Tensor erased = empty_images(given.images(), maps.size(0));
  const at::Tensor areas = at::empty({maps.size(0)}, maps.options().dtype(at::CppTypeToScalarType<S>::value));
  const auto kernel = kernels().erase[sizeof(S) == sizeof(double)][storage_of(images)];
  std::vector<double> sums(given.strips());
  at::parallel_for(0, given.strips(), given.grain(), [&](int64_t begin, int64_t end) {
    Buffer<S> scratch;
    for (int64_t i = begin; i < end; ++i) {
      const PixelRows to = given.rows(erased, i / given.cell_rows(), i);
      sums[i] = kernel(given.strip(i, scratch), given.image_rows(i), to);
    }
  });
  for (int64_t map = 0; map < maps.size(0); ++map) {
    double sum = 0;
    for (int64_t y = 0; y < given.cell_rows(); ++y) sum += sums[map * given.cell_rows() + y];
    areas.mutable_data_ptr<S>()[map] = static_cast<S>(sum);
  }
  return {erased, areas};
}

std::tuple<at::Tensor, at::Tensor> erase(const at::Tensor& images, const at::Tensor& maps, const at::Tensor& which,
                                         double sharpness, double level) {
  check_erase("erase", images, maps, which, sharpness, level);
  const bool wide = maps.scalar_type() == at::kDouble;
  return (wide ? erase_in<double> : erase_in<float>)(images, maps, which, sharpness, level);
}

// The gradient of the attention at a map's cells, from its strips' sums (low and high rows of cells + 1 each), becomes
// that of the map: (A - low) / (high - low) depends on every pixel, and on the extremes' cells once more.
template <typename S>
void finish(const Erasing<S>& given, int64_t map, const S* sums, S* result) {
  const int64_t height = given.cell_rows(), width = given.cells(), size = width + 1;
  const Extremes<S>& found = given.extremes(map);
  const S* cells = given.map(map);
  if (found.rounding()) {
    std::fill(result, result + height * width, S(0));
    return;
  }
  double total = 0, of_attention = 0;
  for (int64_t y = 0; y < height; ++y) {
    const S *low = sums + 2 * y * size, *above = y > 0 ? low - size : nullptr, *attention = given.attention(map, y);
    for (int64_t x = 0; x < width; ++x) {
      const S sum = above ? low[x] + above[x] : low[x];
      result[y * width + x] = sum;
      total += sum;
      if (sum != 0) of_attention += double(sum) * attention[x];  // cells that no pixel reads may be infinite
    }
  }
  const auto add = [&](const int64_t* pixel, double grad) {
    given.each_cell(pixel, [&](int64_t y, int64_t x, S weight) {
      result[y * width + x] += static_cast<S>(grad) * weight;
    });
  };
  add(found.low_at, of_attention - total);
  add(found.high_at, -of_attention);
  for (int64_t i = 0; i < height * width; ++i) result[i] = cells[i] <= 0 ? S(0) : result[i] / (found.high - found.low);
}

template <typename S>
at::Tensor erase_backward_in(const std::optional<at::Tensor>& grad_, const std::optional<at::Tensor>& grad_areas_,
                             const at::Tensor& images, const at::Tensor& maps, const at::Tensor& which,
                             double sharpness, double level) {
  const Erasing<S> given(images, maps, which, sharpness, level);
  at::Tensor grad, grad_areas;
  if (grad_) grad = dense_pixels(grad_->to(images.scalar_type()));
  if (grad_areas_) grad_areas = grad_areas_->to(at::kDouble).contiguous();
  const auto kernel = kernels().erase_backward[sizeof(S) == sizeof(double)][storage_of(images)];
  const int64_t size = given.cells() + 1, height = given.cell_rows();
  Buffer<S> sums;  // of each strip: what it adds to the row of cells above it and to that below
  sums.get(2 * given.strips() * size);
  at::parallel_for(0, given.strips(), given.grain(), [&](int64_t begin, int64_t end) {
    Buffer<S> scratch;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t map = i / height;
      if (given.extremes(map).rounding()) continue;
      const PixelRows grads = grad_ ? given.rows(grad, map, i) : PixelRows{};
      kernel(given.strip(i, scratch), given.image_rows(i), grads,
             grad_areas_ ? grad_areas.const_data_ptr<double>()[map] : 0, sums.data() + 2 * i * size,
             sums.data() + (2 * i + 1) * size);
    }
  });
  const at::Tensor result = at::empty(maps.sizes(), maps.options().dtype(at::CppTypeToScalarType<S>::value));
  at::parallel_for(0, maps.size(0), grain(4 * height * size), [&](int64_t begin, int64_t end) {
    for (int64_t map = begin; map < end; ++map) {
      finish(given, map, sums.data() + 2 * map * height * size,
             result.mutable_data_ptr<S>() + map * height * given.cells());
    }
  });
  return result.to(maps.scalar_type());
}

at::Tensor erase_backward(const std::optional<at::Tensor>& grad, const std::optional<at::Tensor>& grad_areas,
                          const at::Tensor& images, const at::Tensor& maps, const at::Tensor& which, double sharpness,
                          double level) {
  check_erase("erase_backward", images, maps, which, sharpness, level);
  check_erase_gradient(grad, grad_areas, images, maps);
  const bool wide = maps.scalar_type() == at::kDouble;
  return (wide ? erase_backward_in<double> : erase_backward_in<float>)(grad, grad_areas, images, maps, which, sharpness,
                                                                       level);
}

}  // namespace
}  // namespace ribfast::cpu

TORCH_LIBRARY_IMPL(ribfast, CPU, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("erase", &ribfast::cpu::erase);
  m.impl("erase_backward", &ribfast::cpu::erase_backward);
}
