// Mean field over permutohedral lattices (Kraehenbuehl & Koltun 2011): what the CRF's operators share.
#pragma once

#include <cstdint>
#include <vector>

#include "permutohedral.h"

namespace ribfast::cpu {

enum Normalization { kSymmetric, kAfter, kBefore, kNone };

// Of each point: 1 / sqrt(filter(1)) or 1 / filter(1); nothing is written for kNone, and null returned.
const float* normalize(const LatticeArrays& lattice, Normalization how, const Kernels& kernels, Buffer<float>& factor);

// (points, channels) -> (points, channels): splat, blur, slice; transpose: the blur's axes in reverse.
void filter(const LatticeArrays& lattice, const float* values, int64_t channels, bool transpose, const Kernels& kernels,
            float* result);

struct Term {
  LatticeArrays lattice;
  float strength;
  Normalization how;
  const float* factor;  // of its normalisation, or null
};

struct MeanField {
  std::vector<Term> terms;
  int64_t points, labels;
  int64_t labellings = 1;          // independent ones that share the lattices
  const int32_t* order = nullptr;  // the pixel of each point; null: the point's number
  int64_t iterations;
  bool exact;
  const float* unary = nullptr;    // [labelling][label][pixel] energies; or
  const uint8_t* given = nullptr;  // [labelling][pixel] labels, held with:
  double confidence = 0;
  int32_t unsure = -1;  // the label that is none, or -1
  float* probabilities = nullptr;  // the result: [labelling][label][pixel]; or
  uint8_t* best = nullptr;         // [labelling][pixel]: the most probable label

  bool has_one_channel() const;  // the lattices may then be made for one
  void run(const Kernels& kernels) const;
};

// Kernels for a mode: the default tier's contract no multiply-adds.
inline const Kernels& kernels_for(bool exact) { return exact ? tier_default : kernels(); }

}  // namespace ribfast::cpu
