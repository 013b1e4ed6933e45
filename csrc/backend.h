// RIBFAST_BACKEND=triton leaves the device keys to ribfast/_ext.py, which binds the Triton kernels there instead.
#pragma once

#include <cstdlib>
#include <cstring>

namespace ribfast {

inline bool triton_takes_over() {
  const char* backend = std::getenv("RIBFAST_BACKEND");
  return backend != nullptr && std::strcmp(backend, "triton") == 0;
}

}  // namespace ribfast
