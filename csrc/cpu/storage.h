// From torch's types to the kernels'.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "kernels.h"

namespace ribfast::cpu {

inline Storage storage_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return kDouble;
    case at::kHalf: return kHalf;
    case at::kBFloat16: return kBFloat16;
    default: return kFloat;
  }
}

// Items of `size` elements each that one thread should take at least: waking another costs about as much as this.
inline int64_t grain(int64_t size) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, size));
}

inline char* offset(const at::Tensor& t, int64_t elements) {
  return static_cast<char*>(t.data_ptr()) + elements * static_cast<int64_t>(t.element_size());
}

}  // namespace ribfast::cpu
