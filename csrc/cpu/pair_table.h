// The pairs of pixels closer than a radius, and maps copied into margins.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../math.h"
#include "buffer.h"
#include "kernels.h"

namespace ribfast::cpu {

class Pairs {
 public:
  Pairs(int64_t radius, int64_t stride) : radius_(static_cast<int32_t>(radius)), stride_(stride) {
    for (int32_t y = 0; y < radius_; ++y) {
      const int32_t widest = widest_column(y, radius_);
      for (int32_t x = y ? -widest : 1; x <= widest; ++x) {
        y_.push_back(y), x_.push_back(x), first_.push_back(static_cast<int32_t>(cells_.size()));
        for (int32_t row = 0; row <= y; ++row) {
          const PathColumns columns = path_columns(y, x, row);
          for (int32_t column = columns.first; column <= columns.last; ++column) {
            cells_.push_back(static_cast<int32_t>(row * stride + column));
          }
        }
      }
    }
    first_.push_back(static_cast<int32_t>(cells_.size()));
  }

  PairTable table() const {
    return {static_cast<int32_t>(y_.size()), radius_, stride_, y_.data(), x_.data(), cells_.data(), first_.data()};
  }

 private:
  int32_t radius_;
  int64_t stride_;
  std::vector<int32_t> y_, x_, first_, cells_;
};

// A plane of (height, width) with kMargin columns at the left, at least as many at the right behind a whole number of
// vectors, and `above` and `below` rows.
struct Margins {
  int64_t height, width, above, below;

  int64_t rounded() const { return (width + kColumnBlock - 1) / kColumnBlock * kColumnBlock; }
  int64_t stride() const { return kMargin + rounded() + kMargin; }
  int64_t size() const { return (above + height + below) * stride(); }
  int64_t origin() const { return above * stride() + kMargin; }

  // from (height, width) contiguous; `outside` in the margins
  template <typename To, typename From>
  void copy(const From* from, To outside, To* plane) const {
    std::fill(plane, plane + size(), outside);
    for (int64_t y = 0; y < height; ++y) {
      std::copy(from + y * width, from + (y + 1) * width, plane + origin() + y * stride());
    }
  }

  template <typename T>
  void copy_back(const T* plane, T* to) const {
    for (int64_t y = 0; y < height; ++y) {
      const T* row = plane + origin() + y * stride();
      std::copy(row, row + width, to + y * width);
    }
  }
};

// A boundary among margins of 1, which no path crosses; NaN becomes infinity, which path maxima keep.
inline void copy_boundary(const Margins& margins, const float* boundary, float* plane) {
  margins.copy(boundary, 1.0f, plane);
  for (int64_t i = 0; i < margins.size(); ++i) plane[i] = std::isnan(plane[i]) ? INFINITY : plane[i];
}

}  // namespace ribfast::cpu
