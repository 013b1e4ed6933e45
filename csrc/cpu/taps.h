// Where the rows or columns of an enlarged map read (math.h), for the kernel `accumulate`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../math.h"

namespace ribfast::cpu {

// The taps of `count` output positions, repeated to `padded_count`.
struct Taps {
  std::vector<int32_t> cell;
  std::vector<char> t;  // accumulators

  template <typename S>
  void fill(int64_t count, int64_t padded_count, int64_t in, int64_t out) {
    cell.resize(padded_count);
    t.resize(padded_count * sizeof(S));
    const S step = static_cast<S>(in) / static_cast<S>(out);
    for (int64_t i = 0; i < padded_count; ++i) {
      const auto tap = bilinear_tap<S>(static_cast<int32_t>(std::min(i, count - 1)), step, static_cast<int32_t>(in));
      cell[i] = tap.cell;
      reinterpret_cast<S*>(t.data())[i] = tap.t;
    }
  }
};

}  // namespace ribfast::cpu
