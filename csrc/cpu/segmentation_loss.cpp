// pixel_losses and their sums on the CPU: threads over images and the rows between two rows of logits, whose gradients
// each such strip has for itself: results do not depend on the threads. Logits of any strides are read as they are but
// for float64 (copied), once, into rows of columns of labels; beside that and a few rows a thread, and in the backward
// twice as much again, nothing is allocated.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <vector>

#include "../backend.h"
#include "../check.h"
#include "buffer.h"
#include "storage.h"
#include "taps.h"

namespace ribfast::cpu {
namespace {

// Logits in rows of columns of labels, and where pixels lie between them.
class Grid {
 public:
  Grid(const at::Tensor& logits, const at::Tensor& labels)
      : images_(logits.size(0)), height_(logits.size(2)), columns_(logits.size(3)), width_(labels.size(2)),
        n_labels_(static_cast<int32_t>(logits.size(1))), first_row_(height_ + 1) {
    const int64_t lanes = kernels().lanes, rows = labels.size(1);
    padded_ = (n_labels_ + lanes - 1) / lanes * lanes;
    fill(y_, rows, height_);
    fill(x_, width_, columns_);
    for (int64_t row = 0, cell = 0; cell <= height_; ++cell) {
      while (row < rows && y_.cell[row] < cell) ++row;
      first_row_[cell] = row;
    }
    const at::Tensor given = logits.scalar_type() == at::kDouble ? logits.to(at::kFloat) : logits;
    const auto read = kernels().read_logits[storage_of(given)];
    float* to = logits_.get(strips() * row_size());
    at::parallel_for(0, strips(), cpu::grain(row_size()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        read(offset(given, i / height_ * given.stride(0) + i % height_ * given.stride(2)), given.stride(1),
             given.stride(3), n_labels_, columns_, padded_, to + i * row_size());
      }
    });
  }

  // Strip i: the rows of pixels between row i % height of image i / height and the next, or beyond the last.
  int64_t strips() const { return images_ * height_; }
  int64_t row_size() const { return (columns_ + 1) * padded_; }
  int64_t grain() const { return cpu::grain(first_row_[height_] * width_ * padded_ / height_); }

  // Calls f(row, where it begins among all pixels) for each row of pixels of strip i. labels: of all pixels.
  template <typename F>
  void each_row(int64_t i, const uint8_t* labels, float* scratch, F&& f) const {
    const int64_t image = i / height_, cell = i % height_;
    const float* low = logits_.data() + i * row_size();
    const float* high = cell + 1 < height_ ? low + row_size() : low;
    for (int64_t y = first_row_[cell]; y < first_row_[cell + 1]; ++y) {
      const int64_t at = (image * first_row_[height_] + y) * width_;
      f(LossRow{low, high, weights(y_)[y], x_.cell.data(), weights(x_), labels + at, width_, columns_, padded_,
                n_labels_, scratch},
        at);
    }
  }
  float* scratch(Buffer<float>& buffer) const { return buffer.get(loss_scratch(width_, columns_, padded_)); }

 private:
  static float* weights(Taps& taps) { return reinterpret_cast<float*>(taps.t.data()); }
  static const float* weights(const Taps& taps) { return reinterpret_cast<const float*>(taps.t.data()); }

  // Beyond the last cell both taps are that cell.
  static void fill(Taps& taps, int64_t count, int64_t in) {
    taps.fill<float>(count, count, in, count);
    for (int64_t i = 0; i < count; ++i) {
      if (taps.cell[i] == in - 1) weights(taps)[i] = 0;
    }
  }

  int64_t images_, height_, columns_, width_, padded_;
  int32_t n_labels_;
  std::vector<int64_t> first_row_;  // of each strip's pixels
  Taps y_, x_;
  Buffer<float> logits_;
};

at::Tensor pixel_losses(const at::Tensor& logits, const at::Tensor& labels_) {
  const char* op = "segmentation_loss";
  check_pixel_losses(op, logits, labels_);
  const at::Tensor labels = labels_.contiguous(), result = at::empty(labels.sizes(), logits.options().dtype(at::kFloat));
  const Grid grid(logits, labels);
  const auto kernel = kernels().pixel_losses;
  std::atomic<int32_t> wrong{-1};
  at::parallel_for(0, grid.strips(), grid.grain(), [&](int64_t begin, int64_t end) {
    Buffer<float> buffer;
    for (int64_t i = begin; i < end; ++i) {
      grid.each_row(i, labels.const_data_ptr<uint8_t>(), grid.scratch(buffer), [&](const LossRow& row, int64_t at) {
        const int32_t found = kernel(row, result.mutable_data_ptr<float>() + at);
        if (found >= 0) wrong = found;
      });
    }
  });
  RIBFAST_CHECK_VALUE(wrong < 0, op, c10::str("labels below ", logits.size(1), " or 255, ignored"), wrong.load(),
                      "; renumber the labels");
  return result;
}

// Not fitted where it is not active.
LossFit fit_of(const std::optional<at::Tensor>& active, int64_t fit, double k) {
  const bool fits = fit != kFitAll && *active->const_data_ptr<bool>();
  return {fits ? static_cast<int32_t>(fit) : kFitAll, static_cast<float>(k)};
}

at::Tensor pixel_loss_sums(const at::Tensor& logits, const at::Tensor& labels_, const at::Tensor& losses_,
                           const std::optional<at::Tensor>& active, int64_t fit_, double k) {
  check_pixel_loss_sums("pixel_loss_sums", logits, labels_, losses_, active, fit_, k);
  const at::Tensor labels = labels_.contiguous(), losses = losses_.contiguous();
  const LossFit fit = fit_of(active, fit_, k);
  const auto kernel = kernels().pixel_loss_sums;
  constexpr int64_t kPart = 1024;  // pixels added up in float; parts are, in their order, whatever the threads
  const int64_t parts = (losses.numel() + kPart - 1) / kPart;
  std::vector<std::array<double, 4>> sums(parts);
  at::parallel_for(0, parts, grain(kPart), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      sums[i].fill(0);
      kernel(losses.const_data_ptr<float>() + i * kPart, labels.const_data_ptr<uint8_t>() + i * kPart,
             std::min(kPart, losses.numel() - i * kPart), static_cast<int32_t>(logits.size(1)), fit, sums[i].data());
    }
  });
  const at::Tensor result = at::empty({4}, losses.options().dtype(at::kDouble));
  for (int i = 0; i < 4; ++i) {
    double total = 0;
    for (const auto& part : sums) total += part[i];
    result.mutable_data_ptr<double>()[i] = total;
  }
  return result;
}

at::Tensor pixel_loss_sums_backward(const at::Tensor& grad_, const at::Tensor& logits, const at::Tensor& labels_,
                                    const at::Tensor& losses_, const std::optional<at::Tensor>& active, int64_t fit_,
                                    double k) {
  check_pixel_loss_sums("pixel_loss_sums_backward", logits, labels_, losses_, active, fit_, k);
  check_pixel_loss_gradient(grad_, logits);
  const at::Tensor labels = labels_.contiguous(), losses = losses_.contiguous(), grad = grad_.to(at::kFloat).contiguous();
  const LossFit fit = fit_of(active, fit_, k);
  const Grid grid(logits, labels);
  const int64_t height = logits.size(2), columns = logits.size(3), size = grid.row_size();
  const auto kernel = kernels().pixel_losses_backward;
  Buffer<float> sums_buffer;  // of each strip: what it adds to the row of logits above it and to that below
  float* sums = sums_buffer.get(2 * grid.strips() * size);
  at::parallel_for(0, grid.strips(), grid.grain(), [&](int64_t begin, int64_t end) {
    Buffer<float> buffer;
    for (int64_t i = begin; i < end; ++i) {
      float *low = sums + 2 * i * size, *high = low + size;
      std::fill(low, high + size, 0.0f);
      grid.each_row(i, labels.const_data_ptr<uint8_t>(), grid.scratch(buffer), [&](const LossRow& row, int64_t at) {
        kernel(row, losses.const_data_ptr<float>() + at, grad.const_data_ptr<float>(), fit, low, high);
      });
    }
  });
  const auto stored = logits.scalar_type() == at::kDouble ? at::kFloat : logits.scalar_type();
  const at::Tensor result = at::empty(logits.sizes(), logits.options().dtype(stored));
  const auto write = kernels().write_logits[storage_of(result)];
  at::parallel_for(0, grid.strips(), grain(size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float *low = sums + 2 * i * size, *above = i % height > 0 ? low - size : nullptr;
      const int64_t image = i / height;
      write(low, above, static_cast<int32_t>(logits.size(1)), columns, size / (columns + 1), height * columns,
            offset(result, (image * logits.size(1) * height + i % height) * columns));
    }
  });
  return result.to(logits.scalar_type());
}

}  // namespace
}  // namespace ribfast::cpu

TORCH_LIBRARY_IMPL(ribfast, CPU, m) {
  if (ribfast::triton_takes_over()) return;
  m.impl("pixel_losses", &ribfast::cpu::pixel_losses);
  m.impl("pixel_loss_sums", &ribfast::cpu::pixel_loss_sums);
  m.impl("pixel_loss_sums_backward", &ribfast::cpu::pixel_loss_sums_backward);
}
