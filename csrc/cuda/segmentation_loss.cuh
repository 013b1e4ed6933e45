// Cross-entropies of pixels over logits that are enlarged on the way, their sums, and the logits' gradient.
//
// Layout: logits (images, n_labels, height, width) of T, n_labels at most 255; labels and losses (images, rows, columns),
// uint8 and float32; all contiguous. A block is a cell of the logits' grid, cell (y, x) being the pixels whose taps are
// (y, x), (y, x + 1), (y + 1, x) and (y + 1, x + 1): all of them read the same four logits a label. Labels of n_labels
// and more are ignored. The gradient is gathered from what the cells have for their corners, in a fixed order.
#pragma once

#include "common.cuh"

namespace ribfast::cuda {

constexpr int kLossThreads = 128, kLossWarps = kLossThreads / kWarp;
constexpr int kMostLabels = 256;  // a multiple of the warp

struct LossMaps {
  const uint8_t* labels;
  int32_t n_labels, height, width, rows, columns;
};

struct LossFit {
  const bool* active;  // may be null where `how` is kFitAll
  int32_t how;
  float k;

  __device__ bool fits() const { return how != kFitAll && *active; }
  __device__ float fitted(float loss) const {
    if (how == kClampLoss) return loss > k ? k : loss;
    if (how == kIgnoreLoss) return loss > k ? 0.0f : loss;
    return loss > kLeastLoss ? powf(loss, k) : loss * powf(kLeastLoss, k - 1);
  }
  __device__ float slope(float loss) const {
    if (how == kClampLoss || how == kIgnoreLoss) return static_cast<float>(loss <= k);
    return loss > kLeastLoss ? k * powf(loss, k - 1) : powf(kLeastLoss, k - 1);
  }
};

using Corners = Pack<float, 4>;

__device__ __forceinline__ float dot(const Corners& a, const Corners& b) {
  return a.at[0] * b.at[0] + a.at[1] * b.at[1] + a.at[2] * b.at[2] + a.at[3] * b.at[3];
}

// A block's cell in shared memory: its logits and which pixels it has.
struct LossCell {
  Corners logits[kMostLabels];
  int32_t bounds[4];  // rows, columns

  template <typename T>
  __device__ void load(const T* logits_, const LossMaps& maps) {
    const int32_t x = cell_x(maps), y = cell_y(maps), right = min(x + 1, maps.width - 1);
    const int64_t n = static_cast<int64_t>(maps.height) * maps.width, here = static_cast<int64_t>(y) * maps.width;
    const int64_t below = static_cast<int64_t>(min(y + 1, maps.height - 1)) * maps.width;
    for (int label = static_cast<int>(threadIdx.x); label < maps.n_labels; label += kLossThreads) {
      const T* plane = logits_ + (image(maps) * maps.n_labels + label) * n;
      logits[label] = {widen(plane[here + x]), widen(plane[here + right]), widen(plane[below + x]),
                       widen(plane[below + right])};
    }
    if (threadIdx.x < 4) {
      const auto end = static_cast<int32_t>(threadIdx.x % 2);
      bounds[threadIdx.x] = threadIdx.x < 2 ? first_pixel(y + end, step_y(maps), maps.rows, maps.height)
                                            : first_pixel(x + end, step_x(maps), maps.columns, maps.width);
    }
    __syncthreads();
  }

  static __device__ int32_t cell_x(const LossMaps& maps) { return static_cast<int32_t>(blockIdx.x % maps.width); }
  static __device__ int32_t cell_y(const LossMaps& maps) {
    return static_cast<int32_t>(blockIdx.x / maps.width % maps.height);
  }
  static __device__ int64_t image(const LossMaps& maps) { return blockIdx.x / maps.width / maps.height; }
  static __device__ float step_y(const LossMaps& maps) {
    return static_cast<float>(maps.height) / static_cast<float>(maps.rows);
  }
  static __device__ float step_x(const LossMaps& maps) {
    return static_cast<float>(maps.width) / static_cast<float>(maps.columns);
  }

  __device__ int64_t count() const {
    return static_cast<int64_t>(bounds[1] - bounds[0]) * (bounds[3] - bounds[2]);
  }

  // Of the cell's i-th pixel: where it is among all, and the weights of the four corners. Beyond the last logit both
  // taps are that logit: the first has all the weight.
  __device__ int64_t pixel(int64_t i, const LossMaps& maps, Corners* weights) const {
    const int32_t across = bounds[3] - bounds[2];
    const auto y = bounds[0] + static_cast<int32_t>(i / across), x = bounds[2] + static_cast<int32_t>(i % across);
    const float low = cell_y(maps) + 1 < maps.height ? bilinear_tap<float>(y, step_y(maps), maps.height).t : 0.0f;
    const float right = cell_x(maps) + 1 < maps.width ? bilinear_tap<float>(x, step_x(maps), maps.width).t : 0.0f;
    *weights = {(1 - low) * (1 - right), (1 - low) * right, low * (1 - right), low * right};
    return (image(maps) * maps.rows + y) * maps.columns + x;
  }
};

// Sum over labels of exp(z - top), top the largest z.
__device__ __forceinline__ float sum_below_top(const LossCell& cell, const Corners& weights, int32_t n_labels,
                                               float* top) {
  *top = -INFINITY;
  for (int32_t label = 0; label < n_labels; ++label) *top = fmaxf(*top, dot(cell.logits[label], weights));
  float sum = 0;
  for (int32_t label = 0; label < n_labels; ++label) sum += expf(dot(cell.logits[label], weights) - *top);
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kLossThreads) pixel_losses_kernel(const T* logits, LossMaps maps, float* losses) {
  constexpr float kLargest = 80;  // of z - z[label]: below, exp is far from overflow, and one pass over labels does
  __shared__ LossCell cell;
  cell.load(logits, maps);
  const int64_t count = cell.count();
  for (int64_t i = threadIdx.x; i < count; i += kLossThreads) {
    Corners weights;
    const int64_t at = cell.pixel(i, maps, &weights);
    const int32_t label = maps.labels[at];
    float loss = 0;
    if (label < maps.n_labels) {
      const float own = dot(cell.logits[label], weights);
      float sum = 0, top = 0;
      for (int32_t other = 0; other < maps.n_labels; ++other) {
        const float z = dot(cell.logits[other], weights) - own;
        top = fmaxf(top, z);
        if (other != label) sum += expf(z);
      }
      if (top <= kLargest) {
        loss = log1pf(sum);
      } else {
        sum = sum_below_top(cell, weights, maps.n_labels, &top);
        loss = top - own + logf(sum);
      }
    }
    losses[at] = loss;
  }
}

constexpr int kLossSumThreads = 256, kLossSumPixels = 16 * kLossSumThreads;

// partial: of each block's pixels the sums of fitted losses of label 0 and of others, and how many there are of each
__global__ void __launch_bounds__(kLossSumThreads)
    pixel_loss_sums_kernel(const float* losses, LossMaps maps, int64_t n, LossFit fit, double* partial) {
  __shared__ double scratch[kWarp];
  const bool fits = fit.fits();
  float sums[4] = {};
  for (int i = 0; i < kLossSumPixels / kLossSumThreads; ++i) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kLossSumPixels + i * kLossSumThreads + threadIdx.x;
    const int32_t label = at < n ? maps.labels[at] : kIgnoredLabel;
    if (label >= maps.n_labels) continue;
    const float loss = fits ? fit.fitted(losses[at]) : losses[at];
    if (label == 0) {
      sums[0] += loss, sums[2] += 1;
    } else {
      sums[1] += loss, sums[3] += 1;
    }
  }
  for (int k = 0; k < 4; ++k) {
    const double total = block_reduce(static_cast<double>(sums[k]), Plus(), scratch);
    if (threadIdx.x == 0) partial[static_cast<int64_t>(blockIdx.x) * 4 + k] = total;
    __syncthreads();
  }
}

// What a label's lane needs of each of some pixels.
struct LossPixels {
  Corners weights[kLossThreads];
  float at_label[kLossThreads], loss[kLossThreads];  // the log of the sum of exp(z) is that of the two
  float slope[kLossThreads];  // 0 where nothing is added
  float own[kLossThreads];    // the own label's gradient
  int32_t label[kLossThreads];
};

// grads: of the sums. partial: of each cell the gradients of its four corners, (4, n_labels). Lanes are labels; with
// few labels, warps share the pixels out, and their sums are added up in the warps' order.
template <typename T>
__global__ void __launch_bounds__(kLossThreads)
    pixel_losses_backward_kernel(const double* grads, const T* logits, const float* losses, LossMaps maps, LossFit fit,
                                 float* partial) {
  __shared__ LossCell cell;
  __shared__ LossPixels pixels;
  __shared__ Corners sums[kMostLabels];
  const auto thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int chunks = (maps.n_labels + kWarp - 1) / kWarp, parts = max(1, kLossWarps / chunks);
  for (int i = thread; i < kMostLabels; i += kLossThreads) sums[i] = {};
  cell.load(logits, maps);
  const bool fits = fit.fits();
  const int64_t count = cell.count();
  for (int64_t first = 0; first < count; first += kLossThreads) {
    const auto here = static_cast<int>(min(static_cast<int64_t>(kLossThreads), count - first));
    if (thread < here) {
      Corners weights;
      const int64_t at = cell.pixel(first + thread, maps, &weights);
      const int32_t label = maps.labels[at];
      const bool known = label < maps.n_labels;
      const float loss = losses[at];
      pixels.weights[thread] = weights, pixels.label[thread] = label;
      pixels.at_label[thread] = known ? dot(cell.logits[label], weights) : 0.0f, pixels.loss[thread] = loss;
      if (known && loss > kRoughLoss) {
        pixels.loss[thread] = logf(sum_below_top(cell, weights, maps.n_labels, pixels.at_label + thread));
      }
      const auto grad = static_cast<float>(grads[label != 0]);
      const float slope = known ? grad * (fits ? fit.slope(loss) : 1.0f) : 0.0f;
      pixels.slope[thread] = slope, pixels.own[thread] = slope * expm1f(-loss);
    }
    __syncthreads();
    for (int task = thread / kWarp; task < chunks * parts; task += kLossWarps) {
      const int label = task % chunks * kWarp + lane;
      const Corners own = label < maps.n_labels ? cell.logits[label] : Corners{};
      Corners sum = sums[task * kWarp + lane];
      for (int i = task / chunks; i < here; i += parts) {
        const float slope = pixels.slope[i];
        if (slope == 0) continue;
        const Corners weights = pixels.weights[i];
        const float other = slope * expf((dot(own, weights) - pixels.at_label[i]) - pixels.loss[i]);
        const float grad = pixels.label[i] == label ? pixels.own[i] : other;
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) sum.at[corner] += grad * weights.at[corner];
      }
      sums[task * kWarp + lane] = sum;
    }
    __syncthreads();
  }
  for (int label = thread; label < maps.n_labels; label += kLossThreads) {
    Corners total{};
    for (int part = 0; part < parts; ++part) {
      const Corners& sum = sums[part * chunks * kWarp + label];
      for (int corner = 0; corner < 4; ++corner) total.at[corner] += sum.at[corner];
    }
    for (int corner = 0; corner < 4; ++corner) {
      partial[(static_cast<int64_t>(blockIdx.x) * 4 + corner) * maps.n_labels + label] = total.at[corner];
    }
  }
}

constexpr int kGatherThreads = 256;

// A logit is a corner of four cells; `n` logits in all.
template <typename T>
__global__ void __launch_bounds__(kGatherThreads)
    gather_corners_kernel(const float* partial, LossMaps maps, int64_t n, T* result) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kGatherThreads + threadIdx.x;
  if (at >= n) return;
  const auto x = static_cast<int32_t>(at % maps.width), y = static_cast<int32_t>(at / maps.width % maps.height);
  const int64_t plane = at / maps.width / maps.height, label = plane % maps.n_labels, image = plane / maps.n_labels;
  float sum = 0;
  for (int corner = 0; corner < 4; ++corner) {
    const int32_t cell_y = y - corner / 2, cell_x = x - corner % 2;
    if (cell_y < 0 || cell_x < 0) continue;
    const int64_t cell = (image * maps.height + cell_y) * maps.width + cell_x;
    sum += partial[(cell * 4 + corner) * maps.n_labels + label];
  }
  result[at] = narrow<T>(sum);
}

}  // namespace ribfast::cuda
