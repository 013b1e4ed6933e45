// What refine's neighbours are on every device: the 8 around a pixel, at each of some dilations. Free of torch.
#pragma once

#include <cmath>
#include <cstdint>

namespace ribfast {
namespace {

constexpr int kAround = 8, kMostDilations = 16, kMostNeighbours = kAround * kMostDilations;
constexpr int32_t kAroundRows[kAround] = {-1, -1, -1, 0, 0, 1, 1, 1};
constexpr int32_t kAroundColumns[kAround] = {-1, 0, 1, -1, 1, -1, 0, 1};

// What a neighbour's place adds to its weight in PAR: w2 softmax(-(p / (std p + 1e-8) / w1)^2), p the distances of the
// neighbours, d or sqrt(2) d, and std p their unbiased standard deviation. One for each neighbour of `count` dilations.
inline void position_weights(const int64_t* dilations, int64_t count, double w1, double w2, float* weights) {
  const int64_t neighbours = count * kAround;
  double distances[kMostNeighbours], mean = 0, variance = 0, top = -INFINITY, sum = 0;
  for (int64_t k = 0; k < neighbours; ++k) {
    const bool diagonal = kAroundRows[k % kAround] != 0 && kAroundColumns[k % kAround] != 0;
    distances[k] = static_cast<double>(dilations[k / kAround]) * (diagonal ? std::sqrt(2.0) : 1.0);
    mean += distances[k] / static_cast<double>(neighbours);
  }
  for (int64_t k = 0; k < neighbours; ++k) variance += (distances[k] - mean) * (distances[k] - mean);
  const double unit = (std::sqrt(variance / static_cast<double>(neighbours - 1)) + 1e-8) * w1;
  for (int64_t k = 0; k < neighbours; ++k) {
    distances[k] = -(distances[k] / unit) * (distances[k] / unit);
    top = distances[k] > top ? distances[k] : top;
  }
  for (int64_t k = 0; k < neighbours; ++k) sum += std::exp(distances[k] - top);
  for (int64_t k = 0; k < neighbours; ++k) {
    weights[k] = static_cast<float>(w2 * (std::exp(distances[k] - top) / sum));
  }
}

}  // namespace
}  // namespace ribfast
