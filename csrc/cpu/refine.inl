// Local refinement of class maps: m(u) <- sum over neighbours k of weight_k(u) m(u + k), by affinities of an image.
// Included by kernels.inl. PAR (Ru, Zhan, Yu and Du 2022): weight = softmax over k of -mean over channels of
// (|I_k - I_0| / (s + 1e-8) / w1)^2, plus the neighbour's position weight; s: the neighbours' unbiased standard
// deviation. PAMR (Araslanov and Roth 2020): softmax of -mean of |I_k - I_0| / (1e-8 + 0.1 s); s: that of the
// neighbours and of the centre once for each dilation, as the released code has it.
//
// Layout: planes of rows `stride` floats apart, each row readable up to the farthest neighbour on both sides of
// [0, width rounded up to kRefineBlock); weights of a row [block of kRefineBlock pixels][neighbour][kRefineBlock].

RIBFAST_INLINE VFloat square_root(VFloat v) {
#if RIBFAST_VECTOR_BYTES == 64
  return bits<VFloat>(_mm512_sqrt_ps(bits<__m512>(v)));
#elif RIBFAST_VECTOR_BYTES == 32
  return bits<VFloat>(_mm256_sqrt_ps(bits<__m256>(v)));
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// Where the neighbours of a row's pixels are, from its plane's first pixel: rows beyond the border are the border's.
RIBFAST_INLINE void find_neighbours(const RefineJob& job, int64_t row, int64_t* offsets) {
  for (int32_t k = 0; k < job.neighbours; ++k) {
    int64_t other = row + job.rows[k];
    other = other < 0 ? 0 : other < job.height ? other : job.height - 1;
    offsets[k] = other * job.stride + job.columns[k];
  }
}

// Everything is taken relative to the centre, and PAR's exponents without the term that its neighbours share: with
// v = I_k - mean, (I_k - I_0)^2 = v (v + 2 (mean - I_0)) + (mean - I_0)^2. Rounding is then relative to the contrast, not
// to an image's offset or to how far a pixel stands out.
template <bool kPamr>
RIBFAST_INLINE void affinities_of_row(const RefineJob& job, const float* image, int64_t row, float* weights) {
  constexpr int kColours = 3;
  const int32_t neighbours = job.neighbours;
  const auto centres = static_cast<float>(kPamr ? neighbours / 8 : 0), count = static_cast<float>(neighbours) + centres;
  int64_t offsets[kMostRefineNeighbours];
  find_neighbours(job, row, offsets);
  VFloat differences[kColours][kMostRefineNeighbours], exponents[kMostRefineNeighbours];
  for (int64_t x = 0; x < job.width; x += kLanes) {
    VFloat mean[kColours], scale[kColours], shift[kColours];
    for (int c = 0; c < kColours; ++c) {
      const float* plane = image + c * job.plane + x;
      const VFloat centre = load_raw<VFloat>(plane + row * job.stride);
      VFloat sum[4] = {}, squares[4] = {};
      for (int32_t k = 0; k < neighbours; k += 4) {
        for (int j = 0; j < 4; ++j) {
          differences[c][k + j] = load_raw<VFloat>(plane + offsets[k + j]) - centre;
          sum[j] += differences[c][k + j];
        }
      }
      mean[c] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) / count;
      for (int32_t k = 0; k < neighbours; k += 4) {
        for (int j = 0; j < 4; ++j) {
          const VFloat v = differences[c][k + j] - mean[c];
          squares[j] += v * v;
        }
      }
      VFloat total = (squares[0] + squares[1]) + (squares[2] + squares[3]);
      if (kPamr) total += centres * mean[c] * mean[c];
      const VFloat deviation = square_root(total / (count - 1.0f));
      if (kPamr) {
        scale[c] = (1.0f / kColours) / (1e-8f + 0.1f * deviation);
      } else {
        const VFloat inverse = 1.0f / ((deviation + 1e-8f) * job.w1);
        scale[c] = inverse * inverse * (1.0f / kColours);
        shift[c] = 2.0f * mean[c] * scale[c];
      }
    }
    VFloat top[4];
    for (int32_t k = 0; k < neighbours; k += 4) {
      for (int j = 0; j < 4; ++j) {
        VFloat e = VFloat{};
        for (int c = 0; c < kColours; ++c) {
          const VFloat d = differences[c][k + j];
          if (kPamr) {
            e -= bits<VFloat>(bits<VInt32>(d) & 0x7fffffff) * scale[c];
          } else {
            const VFloat v = d - mean[c];
            e -= (v * scale[c] + shift[c]) * v;
          }
        }
        exponents[k + j] = e;
        top[j] = k == 0 || e > top[j] ? e : top[j];
      }
    }
    for (int j = 1; j < 4; ++j) top[0] = top[j] > top[0] ? top[j] : top[0];
    VFloat sum[4] = {};
    for (int32_t k = 0; k < neighbours; k += 4) {
      for (int j = 0; j < 4; ++j) {
        exponents[k + j] = exp_of_negative<VFloat, VInt32>(exponents[k + j] - top[0]);
        sum[j] += exponents[k + j];
      }
    }
    const VFloat share = reciprocal((sum[0] + sum[1]) + (sum[2] + sum[3]));
    float* own = weights + x / kRefineBlock * neighbours * kRefineBlock + x % kRefineBlock;
    for (int32_t k = 0; k < neighbours; ++k) {
      const VFloat weight = exponents[k] * share;
      store_raw(own + k * kRefineBlock, kPamr ? weight : weight + job.position[k]);
    }
  }
}

void affinities(const RefineJob& job, const float* image, int64_t row, float* weights) {
  job.position == nullptr ? affinities_of_row<true>(job, image, row, weights)
                          : affinities_of_row<false>(job, image, row, weights);
}

// Blocks that weights are asked for ahead of their use: they come from far, and the maps' rows are in the way of what
// the processor would fetch by itself.
constexpr int64_t kWeightsAhead = 8;

// kBlocks blocks of a row in kClasses planes. first: the weights have not been asked for.
template <int kClasses, int kBlocks>
RIBFAST_INLINE void refine_blocks(const RefineJob& job, const int64_t* offsets, const float* in, const float* weights,
                                  int64_t x, bool first, float* out, int64_t out_plane) {
  constexpr int kParts = kRefineBlock / kLanes, kVectors = kBlocks * kParts;
  const int64_t block = int64_t{job.neighbours} * kRefineBlock;
  const float* own = weights + x / kRefineBlock * block;
  VFloat sum[kClasses][kVectors];
  for (int c = 0; c < kClasses; ++c) {
    for (int v = 0; v < kVectors; ++v) sum[c][v] = VFloat{};
  }
  for (int32_t k = 0; k < job.neighbours; ++k) {
    const float* from = in + offsets[k] + x;
    for (int v = 0; v < kVectors; ++v) {
      const float* at = own + v / kParts * block + k * kRefineBlock + v % kParts * kLanes;
      if (first) __builtin_prefetch(at + kWeightsAhead * block, 0, 2);
      const VFloat weight = load_raw<VFloat>(at);
      for (int c = 0; c < kClasses; ++c) {
        sum[c][v] += weight * load_raw<VFloat>(from + c * job.plane + v * kLanes);
      }
    }
  }
  for (int c = 0; c < kClasses; ++c) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = x + v * kLanes, left = job.width - at;
      float* to = out + c * out_plane + at;
      if (left >= kLanes) {
        store_raw(to, sum[c][v]);
      } else {
        for (int64_t i = 0; i < left; ++i) to[i] = sum[c][v][i];
      }
    }
  }
}

// Blocks [x, end) of a row in kClasses planes, as many together as fill eight vectors.
template <int kClasses>
RIBFAST_INLINE void refine_planes(const RefineJob& job, const int64_t* offsets, const float* in, const float* weights,
                                  int64_t x, int64_t end, bool first, float* out, int64_t out_plane) {
  constexpr int kAtOnce = kLanes / 2 / kClasses;
  for (; x + kAtOnce * kRefineBlock <= end; x += kAtOnce * kRefineBlock) {
    refine_blocks<kClasses, kAtOnce>(job, offsets, in, weights, x, first, out, out_plane);
  }
  for (; x < end; x += kRefineBlock) {
    refine_blocks<kClasses, 1>(job, offsets, in, weights, x, first, out, out_plane);
  }
}

// One row of all planes. Weights are read from memory once: a stretch of them stays in the first-level cache while the
// planes go over it, up to kLanes / 2 at once.
void refine_row(const RefineJob& job, const float* in, const float* weights, int64_t classes, int64_t row, float* out,
                int64_t out_plane) {
  constexpr int64_t kStretch = 4 * kRefineBlock, kMost = kLanes / 2;
  int64_t offsets[kMostRefineNeighbours];
  find_neighbours(job, row, offsets);
  const int64_t groups = (classes + kMost - 1) / kMost;
  for (int64_t x = 0; x < job.width; x += kStretch) {
    const int64_t whole = (job.width + kRefineBlock - 1) / kRefineBlock * kRefineBlock;
    const int64_t end = x + kStretch < whole ? x + kStretch : whole;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = classes * g / groups, count = classes * (g + 1) / groups - first;
      const float* from = in + first * job.plane;
      float* to = out + first * out_plane;
      switch (count) {
        case 1: refine_planes<1>(job, offsets, from, weights, x, end, g == 0, to, out_plane); break;
        case 2: refine_planes<2>(job, offsets, from, weights, x, end, g == 0, to, out_plane); break;
#if RIBFAST_VECTOR_BYTES >= 32
        case 3: refine_planes<3>(job, offsets, from, weights, x, end, g == 0, to, out_plane); break;
        case 4: refine_planes<4>(job, offsets, from, weights, x, end, g == 0, to, out_plane); break;
#endif
#if RIBFAST_VECTOR_BYTES == 64
        case 5: refine_planes<5>(job, offsets, from, weights, x, end, g == 0, to, out_plane); break;
        case 6: refine_planes<6>(job, offsets, from, weights, x, end, g == 0, to, out_plane); break;
        case 7: refine_planes<7>(job, offsets, from, weights, x, end, g == 0, to, out_plane); break;
        case 8: refine_planes<8>(job, offsets, from, weights, x, end, g == 0, to, out_plane); break;
#endif
      }
    }
  }
}
