// What stands between the convolutions of a network that is adapted to an image: activations, and a step of SGD on
// weights with their batch normalisation folded in (reference.activate, activate_backward, update_folded).
//
// Layout: y, shortcut, grad, result (cells, channels), one cell after another (channels last); mask: one element a
// cell, 0 for the gutter; shortcut and mask may be null, y is written in place. Weights: rows of n elements, one for
// each output; bias gradients (rows); affine (2, rows) = gamma, beta; norm (2, rows) = 1 / sigma, mean. An access is
// kVec elements of one cell or row, so channels and n are multiples of kVec. Empty: cells = 0 only for
// sum_strips_kernel, n = 0. Sums run in a fixed order, without atomics.
#pragma once

#include "common.cuh"

namespace ribfast::cuda {

// Accesses that a thread has in flight at once.
constexpr int kCellThreads = 256, kCellAccesses = 4;

inline int64_t activate_blocks(int64_t cells, int64_t channels, int vec) {
  const int64_t accesses = cells * (channels / vec), block = kCellThreads * kCellAccesses;
  return (accesses + block - 1) / block;
}

// y = min(max(y + shortcut, 0), limit), and 0 in the gutter; NaN stays. width: accesses of a cell.
template <typename T, int kVec>
__global__ void activate_kernel(T* y_, const T* shortcut_, const T* mask, int64_t cells, int64_t width, double limit_) {
  using S = Acc<T>;
  using Access = Pack<T, kVec>;
  const S limit = static_cast<S>(limit_);
  const int64_t accesses = cells * width, begin = static_cast<int64_t>(blockIdx.x) * (kCellThreads * kCellAccesses);
  auto* y = reinterpret_cast<Access*>(y_);
  const auto* shortcut = reinterpret_cast<const Access*>(shortcut_);
  bool inside[kCellAccesses], open[kCellAccesses];  // open: not in the gutter, where nothing has to be read
  if (mask != nullptr) {
    // one long division a block: a cell's number within the block takes a short one
    const int64_t cell = begin / width, ahead = begin - cell * width;
    const bool is_short = width < (int64_t{1} << 31);
#pragma unroll
    for (int k = 0; k < kCellAccesses; ++k) {
      const int64_t i = begin + k * kCellThreads + threadIdx.x, behind = ahead + (i - begin);
      inside[k] = i < accesses;
      const int64_t more = is_short ? static_cast<uint32_t>(behind) / static_cast<uint32_t>(width) : behind / width;
      open[k] = inside[k] && widen(mask[cell + more]) != S(0);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kCellAccesses; ++k) {
      open[k] = inside[k] = begin + k * kCellThreads + threadIdx.x < accesses;
    }
  }
  Access x[kCellAccesses], added[kCellAccesses];
#pragma unroll
  for (int k = 0; k < kCellAccesses; ++k) {
    const int64_t i = begin + k * kCellThreads + threadIdx.x;
    if (open[k]) x[k] = y[i];
    if (open[k] && shortcut != nullptr) added[k] = shortcut[i];
  }
#pragma unroll
  for (int k = 0; k < kCellAccesses; ++k) {
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      S value = 0;
      if (open[k]) {
        value = widen(x[k].at[v]);
        if (shortcut != nullptr) value += widen(added[k].at[v]);
        value = value < S(0) ? S(0) : value;
        value = value > limit ? limit : value;
      }
      x[k].at[v] = narrow<T>(value);
    }
    if (inside[k]) y[begin + k * kCellThreads + threadIdx.x] = x[k];
  }
}

// How cells and channels are shared out to the blocks of activate_backward: a block takes `across` accesses of each
// cell of a strip, its threads stand in `rows` of that width. Follows from the shape alone, and so do results.
struct Strips {
  int across, rows;
  int64_t tiles;         // across the channels
  int64_t cells, count;  // of a strip; strips
};

constexpr int kStripAccesses = 2;  // in flight at once, of grad and of y
constexpr int64_t kStripBlocks = 2048, kMostStrips = 512;  // wanted; what sum_strips_kernel adds up for a channel

inline Strips share_strips(int64_t cells, int64_t channels, int vec) {
  constexpr int64_t kAcross = 32;
  const int64_t width = channels / vec;
  Strips s{};
  s.tiles = (width + kAcross - 1) / kAcross;
  s.across = static_cast<int>((width + s.tiles - 1) / s.tiles);
  s.rows = kCellThreads / s.across;
  const int64_t least = 4 * s.rows;  // so that a partial sum is worth its price
  const int64_t wanted = kStripBlocks / s.tiles < kMostStrips ? kStripBlocks / s.tiles : kMostStrips;
  s.cells = wanted > 0 ? (cells + wanted - 1) / wanted : cells;
  if (s.cells < least) s.cells = least;
  s.count = (cells + s.cells - 1) / s.cells;
  return s;
}

// result = grad where 0 < y < limit, else 0; partial (strips, channels): the sums of the result over each strip.
// Grid: tiles of the first strip, then of the next.
template <typename T, int kVec>
__global__ void __launch_bounds__(kCellThreads, 4)
    activate_backward_kernel(const T* grad_, const T* y_, int64_t cells, int64_t channels, Strips s, double limit_,
                             T* result_, Acc<T>* partial) {
  using S = Acc<T>;
  using Access = Pack<T, kVec>;
  __shared__ S shared[kVec][kCellThreads];
  const S limit = static_cast<S>(limit_);
  const T zero = narrow<T>(S(0));
  const int64_t strip = blockIdx.x / s.tiles, tile = blockIdx.x % s.tiles, width = channels / kVec;
  const int row = threadIdx.x / s.across, lane = threadIdx.x % s.across;
  const int64_t first = strip * s.cells, access = tile * s.across + lane;
  const int64_t end = first + s.cells < cells ? first + s.cells : cells;
  const auto* grad = reinterpret_cast<const Access*>(grad_);
  const auto* y = reinterpret_cast<const Access*>(y_);
  auto* result = reinterpret_cast<Access*>(result_);
  S sums[kVec] = {};
  if (row < s.rows && access < width) {
    for (int64_t cell = first + row; cell < end; cell += kStripAccesses * s.rows) {
      Access g[kStripAccesses], x[kStripAccesses];
#pragma unroll
      for (int k = 0; k < kStripAccesses; ++k) {
        const int64_t i = (cell + k * s.rows) * width + access;
        if (cell + k * s.rows < end) g[k] = grad[i], x[k] = y[i];
      }
#pragma unroll
      for (int k = 0; k < kStripAccesses; ++k) {
        if (cell + k * s.rows < end) {
#pragma unroll
          for (int v = 0; v < kVec; ++v) {
            const S value = widen(x[k].at[v]);
            g[k].at[v] = value > S(0) && value < limit ? g[k].at[v] : zero;
            sums[v] += widen(g[k].at[v]);
          }
          result[(cell + k * s.rows) * width + access] = g[k];
        }
      }
    }
  }
#pragma unroll
  for (int v = 0; v < kVec; ++v) shared[v][threadIdx.x] = sums[v];
  __syncthreads();
  for (int i = threadIdx.x; i < kVec * s.across; i += blockDim.x) {
    const int v = i / s.across, column = i % s.across;
    const int64_t at = tile * s.across + column;
    if (at >= width) continue;
    S total = 0;
    for (int r = 0; r < s.rows; ++r) total += shared[v][r * s.across + column];
    partial[strip * channels + at * kVec + v] = total;
  }
}

constexpr int kSumRows = 16, kSumThreads = kWarp * kSumRows;

// sums (channels) = the sums of partial (strips, channels) over strips, 0 without any. A block takes 32 channels.
template <typename S>
__global__ void sum_strips_kernel(const S* partial, int64_t strips, int64_t channels, S* sums) {
  __shared__ S shared[kSumRows][kWarp];
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  S total = 0;
  if (channel < channels) {
#pragma unroll 8
    for (int64_t i = row; i < strips; i += kSumRows) total += partial[i * channels + channel];
  }
  shared[row][lane] = total;
  __syncthreads();
  if (row != 0 || channel >= channels) return;
  for (int r = 1; r < kSumRows; ++r) total += shared[r][lane];
  sums[channel] = total;
}

// Elements that a thread of update_folded_kernel keeps in registers between its passes; what lies beyond is read again.
constexpr int kHeldWeights = 8, kMostRowThreads = 1024;

inline int update_threads(int64_t n) {
  int threads = kWarp;
  while (threads < kMostRowThreads && static_cast<int64_t>(threads) * kHeldWeights < n) threads += kWarp;
  return threads;
}

// Accesses of 4 elements, 16 bytes of what is kept in float32, where rows stay aligned; else single elements.
template <typename T>
inline int update_width(int64_t n, uintptr_t elements, uintptr_t states) {
  return n % 4 == 0 && elements % (4 * sizeof(T)) == 0 && states % 16 == 0 ? 4 : 1;
}

// All that one launch reads and writes; T: what the convolutions take. anchor and bias_anchor may be null, and what is
// new may be what it is made of (new_weight weight, new_affine affine).
template <typename T>
struct FoldedUpdate {
  const T *grad, *bias_grad, *anchor, *bias_anchor;
  const float *weight, *affine, *norm, *rate;
  float *new_weight, *new_affine, *velocity, *affine_velocity;
  T *folded, *folded_bias;
  int64_t rows, n;
  float momentum, decay, unscale;  // unscale: 1 / what gradients were multiplied by
  bool first;                      // velocities are written without being read
};

// velocity = momentum * velocity + gradient + decay * parameter, parameter -= rate * velocity, where the gradients are
// d gamma = (sum over the row of grad * weight - mean * d beta) / sigma, d beta = bias_grad, d weight = grad * gamma /
// sigma; then folded = weight * gamma / sigma, folded_bias = beta - mean * gamma / sigma. A block a row.
template <typename T, int kVec>
__global__ void __launch_bounds__(kMostRowThreads) update_folded_kernel(FoldedUpdate<T> u) {
  using Elements = Pack<T, kVec>;
  using Floats = Pack<float, kVec>;
  constexpr int kHeld = kHeldWeights / kVec;
  __shared__ float shared[kWarp];
  const int64_t o = blockIdx.x, start = o * u.n, accesses = u.n / kVec;
  const auto* grad = reinterpret_cast<const Elements*>(u.grad + start);
  const auto* anchor = u.anchor == nullptr ? nullptr : reinterpret_cast<const Elements*>(u.anchor + start);
  const auto* weight = reinterpret_cast<const Floats*>(u.weight + start);
  auto* new_weight = reinterpret_cast<Floats*>(u.new_weight + start);
  auto* velocity = reinterpret_cast<Floats*>(u.velocity + start);
  auto* folded = reinterpret_cast<Elements*>(u.folded + start);

  // read by all threads before the barriers below, since thread 0 may write over them behind these
  const float inverse = u.norm[o], mean = u.norm[u.rows + o], rate = *u.rate;
  const float gamma = u.affine[o], beta = u.affine[u.rows + o];
  const float gamma_speed = u.first ? 0.0f : u.momentum * u.affine_velocity[o];
  const float beta_speed = u.first ? 0.0f : u.momentum * u.affine_velocity[u.rows + o];
  const float more = u.bias_anchor == nullptr ? 0.0f : widen(u.bias_anchor[o]);
  const float for_beta = (widen(u.bias_grad[o]) + more) * u.unscale;

  const auto sum = [&](const Elements& one, const Elements& other) {
    Floats both;
#pragma unroll
    for (int v = 0; v < kVec; ++v) both.at[v] = widen(one.at[v]) + (anchor == nullptr ? 0.0f : widen(other.at[v]));
    return both;
  };
  const auto gradient = [&](int64_t i) {
    Elements other{};
    if (anchor != nullptr) other = anchor[i];
    return sum(grad[i], other);
  };

  Elements own[kHeld], others[kHeld];
  Floats g[kHeld], w[kHeld], speed[kHeld];
  float dot = 0;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int64_t i = threadIdx.x + static_cast<int64_t>(k) * blockDim.x;
    if (i < accesses) {
      own[k] = grad[i], w[k] = weight[i];
      if (anchor != nullptr) others[k] = anchor[i];
      if (!u.first) speed[k] = velocity[i];
    }
  }
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int64_t i = threadIdx.x + static_cast<int64_t>(k) * blockDim.x;
    if (i < accesses) {
      g[k] = sum(own[k], others[k]);
#pragma unroll
      for (int v = 0; v < kVec; ++v) dot += g[k].at[v] * w[k].at[v];
    }
  }
  const int64_t beyond = threadIdx.x + static_cast<int64_t>(kHeld) * blockDim.x;
  for (int64_t i = beyond; i < accesses; i += blockDim.x) {
    const Floats more_g = gradient(i), more_w = weight[i];
#pragma unroll
    for (int v = 0; v < kVec; ++v) dot += more_g.at[v] * more_w.at[v];
  }
  dot = block_reduce(dot, Plus(), shared);

  const float for_gamma = inverse * (dot * u.unscale - mean * for_beta);
  const float new_gamma_speed = for_gamma + u.decay * gamma + gamma_speed, new_gamma = gamma - rate * new_gamma_speed;
  const float scale = gamma * inverse * u.unscale, folded_scale = new_gamma * inverse;
  if (threadIdx.x == 0) {
    const float new_beta_speed = for_beta + u.decay * beta + beta_speed, new_beta = beta - rate * new_beta_speed;
    u.affine_velocity[o] = new_gamma_speed, u.affine_velocity[u.rows + o] = new_beta_speed;
    u.new_affine[o] = new_gamma, u.new_affine[u.rows + o] = new_beta;
    u.folded_bias[o] = narrow<T>(new_beta - mean * folded_scale);
  }
  const auto move = [&](int64_t i, const Floats& by, Floats from, Floats at_speed) {
    Elements result;
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      float moving = by.at[v] * scale + from.at[v] * u.decay;
      if (!u.first) moving += at_speed.at[v] * u.momentum;
      at_speed.at[v] = moving;
      from.at[v] -= rate * moving;
      result.at[v] = narrow<T>(from.at[v] * folded_scale);
    }
    velocity[i] = at_speed;
    new_weight[i] = from;
    folded[i] = result;
  };
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int64_t i = threadIdx.x + static_cast<int64_t>(k) * blockDim.x;
    if (i < accesses) move(i, g[k], w[k], speed[k]);
  }
  for (int64_t i = beyond; i < accesses; i += blockDim.x) {
    Floats at_speed{};
    if (!u.first) at_speed = velocity[i];
    move(i, gradient(i), weight[i], at_speed);
  }
}

}  // namespace ribfast::cuda
