// The lattice's kernels, one body for every tier: included after kernels.inl's helpers, inside the tier's unnamed
// namespace. Layouts in lattice.h.

// A vector of kBytes of float and int32.
template <int kBytes>
struct Block {
  typedef float V __attribute__((vector_size(kBytes)));
  typedef int32_t I __attribute__((vector_size(kBytes)));
};

// exp(x) for x <= 0, to 2 ulp; exactly 0 where the result would be subnormal, which the processor would be slow with.
template <typename V, typename I>
RIBFAST_INLINE V exp_of_negative(V x) {
  const V lowest = V{} - 87.0f;
  const I zero = x < lowest;
  x = zero ? lowest : x;
  const V shift = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const V n = (x * 1.44269504f + shift) - shift;
  V r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = V{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const I power = (__builtin_convertvector(n, I) + 127) << 23;
  return zero ? V{} : p * bits<V>(power);
}

// A product that is rounded before it is added to anything. Positions on the lattice reach hundreds of cells: contracted,
// they would move by 1e-5 of a cell, and mean field makes a hundred times that of it where labels are in balance.
RIBFAST_INLINE VFloat rounded(VFloat product) {
#if defined(__x86_64__)
  asm("" : "+v"(product));  // opaque to the compiler, free at run time
#endif
  return product;
}

template <int kDims>
void embed_points(const EmbedJob& job) {
  constexpr int kCorners = kDims + 1;
  using V = VFloat;
  using I = VInt32;
  const float down = 1.0f / kCorners;
  const V shift = V{} + 12582912.0f;
  for (int64_t begin = job.begin * kTile; begin < job.end * kTile; begin += kLanes) {
    const int64_t tile = begin / kTile, lane = begin % kTile;
    V elevated[kCorners], sum = V{};
    for (int j = kDims; j > 0; --j) {
      V feature = V{};
      const float* from = job.features + (j - 1) * job.points + begin;
      if (begin + kLanes <= job.points) {
        feature = load_raw<V>(from);
      } else {
        for (int64_t k = 0; begin + k < job.points; ++k) feature[k] = from[k];
      }
      const V scaled = rounded(feature * job.scale[j - 1]);
      elevated[j] = sum - rounded(static_cast<float>(j) * scaled);
      sum += scaled;
    }
    elevated[0] = sum;
    V nearest[kCorners], difference[kCorners], total = V{};
    for (int i = 0; i < kCorners; ++i) {
      const V v = (elevated[i] * down + shift) - shift;  // to nearest, ties to even
      nearest[i] = v * static_cast<float>(kCorners);
      difference[i] = elevated[i] - nearest[i];
      total += v;
    }
    I rank[kCorners];
    for (int i = 0; i < kCorners; ++i) rank[i] = __builtin_convertvector(total, I);
    for (int i = 0; i < kCorners; ++i) {
      for (int j = i + 1; j < kCorners; ++j) {
        const I less = difference[i] < difference[j];  // -1 or 0
        rank[i] -= less;
        rank[j] += 1 + less;
      }
    }
    V sorted[kCorners];  // t of the coordinate of each rank
    for (int k = 0; k < kCorners; ++k) sorted[k] = V{};
    for (int i = 0; i < kCorners; ++i) {
      const I under = rank[i] < 0, over = rank[i] > kDims, wrap = (under & kCorners) - (over & kCorners);
      rank[i] += wrap;
      nearest[i] += __builtin_convertvector(wrap, V);
      const V t = (elevated[i] - nearest[i]) * down;
      for (int k = 0; k < kCorners; ++k) sorted[k] = rank[i] == k ? t : sorted[k];
    }
    for (int m = 0; m < kCorners; ++m) {
      V weight = m == 0 ? sorted[kDims] + (1.0f - sorted[0]) : sorted[kDims - m] - sorted[(kCorners - m) % kCorners];
      for (int64_t k = 0; k < kLanes; ++k) weight[k] = begin + k < job.points ? weight[k] : 0.0f;
      store_raw(job.weights + (tile * kCorners + m) * kTile + lane, weight);
    }
    for (int i = 0; i < kCorners; ++i) {
      if (i < kDims) store_raw(job.base + (tile * kDims + i) * kTile + lane, __builtin_convertvector(nearest[i], I));
      uint8_t* out = job.rank + (tile * kCorners + i) * kTile + lane;
      for (int64_t k = 0; k < kLanes; ++k) out[k] = static_cast<uint8_t>(rank[i][k]);
    }
  }
}

void embed(const EmbedJob& job) {
  switch (job.dims) {
    case 1: return embed_points<1>(job);
    case 2: return embed_points<2>(job);
    case 3: return embed_points<3>(job);
    case 4: return embed_points<4>(job);
    case 5: return embed_points<5>(job);
    case 6: return embed_points<6>(job);
    case 7: return embed_points<7>(job);
    default: return embed_points<8>(job);
  }
}

// Blur along one axis: out(v) = in(v) + (in(before v) + in(after v)) / 2 for vertices [begin, end).
template <int kBytes>
RIBFAST_INLINE int32_t blur_channels(const float* in, const int32_t* neighbours, int64_t begin, int64_t end,
                                     int32_t channels, int32_t first, float* out) {
  using V = typename Block<kBytes>::V;
  constexpr int32_t kCount = kBytes / 4;
  if (first + kCount > channels) return first;
  const int32_t last = first + (channels - first) / kCount * kCount;
  for (int64_t v = begin; v < end; ++v) {
    const float* a = in + static_cast<int64_t>(neighbours[2 * v]) * channels;
    const float* b = in + static_cast<int64_t>(neighbours[2 * v + 1]) * channels;
    const float* self = in + v * channels;
    for (int32_t c = first; c < last; c += kCount) {
      store_raw(out + v * channels + c,
                load_raw<V>(self + c) + 0.5f * (load_raw<V>(a + c) + load_raw<V>(b + c)));
    }
  }
  return last;
}

void blur(const float* in, const int32_t* neighbours, int64_t begin, int64_t end, int32_t channels, float* out) {
  int32_t first = 0;
#if RIBFAST_VECTOR_BYTES >= 64
  first = blur_channels<64>(in, neighbours, begin, end, channels, first, out);
#endif
#if RIBFAST_VECTOR_BYTES >= 32
  first = blur_channels<32>(in, neighbours, begin, end, channels, first, out);
#endif
  first = blur_channels<16>(in, neighbours, begin, end, channels, first, out);
  for (; first < channels; ++first) {
    for (int64_t v = begin; v < end; ++v) {
      const float a = in[static_cast<int64_t>(neighbours[2 * v]) * channels + first];
      const float b = in[static_cast<int64_t>(neighbours[2 * v + 1]) * channels + first];
      out[v * channels + first] = in[v * channels + first] + 0.5f * (a + b);
    }
  }
}

// Where a point's first corner stands; the next is kTile further.
RIBFAST_INLINE int64_t corner_at(const LatticeView& lattice, int64_t p) {
  return p / kTile * (lattice.dims + 1) * kTile + p % kTile;
}

constexpr float slice_scale(int dims) { return 1.0f / (1.0f + 1.0f / static_cast<float>(1 << dims)); }

// A point's sliced values in one block of channels; corners and weights: its own in the tile. Everything is a copy in
// registers: the compiler cannot know that what the kernels store is none of what they read.
template <int kBytes, int kCorners>
RIBFAST_INLINE typename Block<kBytes>::V sliced_block(const int32_t* corners, const float* weights, const float* values,
                                                      int64_t channels) {
  using V = typename Block<kBytes>::V;
  constexpr float alpha = slice_scale(kCorners - 1);
  V sum = V{};
  for (int r = 0; r < kCorners; ++r) {
    sum += (weights[r * kTile] * alpha) * load_raw<V>(values + corners[r * kTile] * channels);
  }
  return sum;
}

template <int kBytes, int kCorners>
RIBFAST_INLINE void splat_block(const int32_t* corners, const float* weights, float* splat, int64_t channels,
                                typename Block<kBytes>::V value) {
  using V = typename Block<kBytes>::V;
  for (int r = 0; r < kCorners; ++r) {
    float* vertex = splat + corners[r * kTile] * channels;
    store_raw(vertex, load_raw<V>(vertex) + weights[r * kTile] * value);
  }
}

// A number that the compiler knows.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls f with the number of corners as a constant.
template <typename F>
RIBFAST_INLINE void with_corners(int32_t dims, F&& f) {
  switch (dims) {
    case 2: return f(Constant<3>());
    case 5: return f(Constant<6>());
    case 1: return f(Constant<2>());
    case 3: return f(Constant<4>());
    case 4: return f(Constant<5>());
    case 6: return f(Constant<7>());
    case 7: return f(Constant<8>());
    default: return f(Constant<9>());
  }
}

// Calls f(block bytes, first channel) for blocks that cover the channels, widest first.
template <typename F>
RIBFAST_INLINE void over_blocks(int32_t channels, F&& f) {
  int32_t c = 0;
#if RIBFAST_VECTOR_BYTES >= 64
  for (; c + 16 <= channels; c += 16) f(Constant<64>(), c);
#endif
#if RIBFAST_VECTOR_BYTES >= 32
  for (; c + 8 <= channels; c += 8) f(Constant<32>(), c);
#endif
  for (; c + 4 <= channels; c += 4) f(Constant<16>(), c);
}

// energies (of one tile's points, [point][channels]) += strength * after * slice; message: the sums of the sliced
// channels, where a label is left out.
void add_messages(const LatticeView& lattice, int64_t tile, int32_t channels, bool reduced, float* energies,
                  float* message) {
  const float strength = lattice.strength;
  const float* values = lattice.values;
  with_corners(lattice.dims, [&](auto count) {
    constexpr int kCorners = decltype(count)::value;
    const int32_t* corners = lattice.corners + tile * kCorners * kTile;
    const float* weights = lattice.weights + tile * kCorners * kTile;
    for (int k = 0; k < kTile; ++k) {
      const float after = lattice.after == nullptr ? 1.0f : lattice.after[tile * kTile + k];
      float total = 0;
      over_blocks(channels, [&](auto bytes, int32_t first) {
        constexpr int kBytes = decltype(bytes)::value;
        using V = typename Block<kBytes>::V;
        const V sliced = sliced_block<kBytes, kCorners>(corners + k, weights + k, values + first, channels) * after;
        float* energy = energies + k * channels + first;
        store_raw(energy, load_raw<V>(energy) + strength * sliced);
        if (reduced) {
          for (int i = 0; i < kBytes / 4; ++i) total += sliced[i];
        }
      });
      if (reduced) message[k] += strength * (lattice.ones[tile * kTile + k] - total);
    }
  });
}

void splat_points(const LatticeView& lattice, int64_t tile, int32_t channels, const float* q) {
  float* splat = lattice.splat;
  with_corners(lattice.dims, [&](auto count) {
    constexpr int kCorners = decltype(count)::value;
    const int32_t* corners = lattice.corners + tile * kCorners * kTile;
    const float* weights = lattice.weights + tile * kCorners * kTile;
    for (int k = 0; k < kTile; ++k) {
      const float before = lattice.before == nullptr ? 1.0f : lattice.before[tile * kTile + k];
      over_blocks(channels, [&](auto bytes, int32_t first) {
        constexpr int kBytes = decltype(bytes)::value;
        using V = typename Block<kBytes>::V;
        splat_block<kBytes, kCorners>(corners + k, weights + k, splat + first, channels,
                                      load_raw<V>(q + k * channels + first) * before);
      });
    }
  });
}

// softmax of one point's energies, in place; left_out: the energy of the label that is left out, or -inf.
RIBFAST_INLINE void softmax(float* energies, int32_t channels, float left_out, bool exact) {
  typedef typename Block<16>::V V4;
  typedef typename Block<16>::I I4;
  V4 top4 = load_raw<V4>(energies);
  for (int32_t c = 4; c < channels; c += 4) {
    const V4 e = load_raw<V4>(energies + c);
    top4 = e > top4 ? e : top4;
  }
  float top = left_out;
  for (int k = 0; k < 4; ++k) top = top4[k] > top ? top4[k] : top;
  float sum = 0;
  if (exact) {
    for (int32_t c = 0; c < channels; ++c) sum += energies[c] = __builtin_expf(energies[c] - top);
  } else {
    over_blocks(channels, [&](auto bytes, int32_t first) {
      constexpr int kBytes = decltype(bytes)::value;
      using V = typename Block<kBytes>::V;
      const V e = exp_of_negative<V, typename Block<kBytes>::I>(load_raw<V>(energies + first) - top);
      store_raw(energies + first, e);
      for (int k = 0; k < kBytes / 4; ++k) sum += e[k];
    });
    if (left_out > -kInfinity<float>) sum += exp_of_negative<V4, I4>(V4{} + (left_out - top))[0];
  }
  const float share = 1 / sum;
  if (exact) {
    for (int32_t c = 0; c < channels; ++c) energies[c] /= sum;
  } else {
    over_blocks(channels, [&](auto bytes, int32_t first) {
      using V = typename Block<decltype(bytes)::value>::V;
      store_raw(energies + first, load_raw<V>(energies + first) * share);
    });
  }
}

// Many channels: a tile at a time, vectors over channels. energies: [kTile][channels].
void update_points(const PixelJob& job, float* energies) {
  const int32_t channels = job.channels;
  const int64_t size = int64_t{kTile} * channels;
  for (int64_t tile = job.begin; tile < job.end; ++tile) {
    __builtin_memcpy(energies, job.negative_unary + tile * size, size * sizeof(float));
    float left_out[kTile];
    for (float& energy : left_out) energy = job.reduced ? 0 : -kInfinity<float>;
    for (int32_t l = 0; l < job.count; ++l) {
      if (job.lattices[l].values != nullptr) {
        add_messages(job.lattices[l], tile, channels, job.reduced, energies, left_out);
      }
    }
    for (int k = 0; k < kTile; ++k) softmax(energies + k * channels, channels, left_out[k], job.exact);
    for (int32_t l = 0; l < job.count; ++l) {
      if (job.lattices[l].splat != nullptr) splat_points(job.lattices[l], tile, channels, energies);
    }
    if (job.probabilities != nullptr) {
      __builtin_memcpy(job.probabilities + tile * size, energies, size * sizeof(float));
    }
  }
}

RIBFAST_INLINE VFloat gather(const float* from, VInt32 index) {
#if RIBFAST_VECTOR_BYTES == 64
  return bits<VFloat>(_mm512_i32gather_ps(bits<__m512i>(index), from, 4));
#elif RIBFAST_VECTOR_BYTES == 32
  return bits<VFloat>(_mm256_i32gather_ps(from, bits<__m256i>(index), 4));
#else
  VFloat v;
  for (int k = 0; k < kLanes; ++k) v[k] = from[index[k]];
  return v;
#endif
}

// One channel: what points [p, p + kLanes) read.
RIBFAST_INLINE VFloat sliced_one(const LatticeView& lattice, int64_t p) {
  const int64_t at = corner_at(lattice, p);
  VFloat sum = VFloat{};
  for (int32_t r = 0; r <= lattice.dims; ++r) {
    sum += load_raw<VFloat>(lattice.weights + at + r * kTile) *
           gather(lattice.values, load_raw<VInt32>(lattice.corners + at + r * kTile));
  }
  return sum * slice_scale(lattice.dims);
}

RIBFAST_INLINE void splat_one(const LatticeView& lattice, int64_t tile, const float* value) {
  float* splat = lattice.splat;
  with_corners(lattice.dims, [&](auto count) {
    constexpr int kCorners = decltype(count)::value;
    const int32_t* corners = lattice.corners + tile * kCorners * kTile;
    const float* weights = lattice.weights + tile * kCorners * kTile;
    for (int k = 0; k < kTile; ++k) {
      for (int r = 0; r < kCorners; ++r) splat[corners[r * kTile + k]] += weights[r * kTile + k] * value[k];
    }
  });
}

// One channel (two labels, the second left out): vectors over points. q = 1 / (1 + exp(energy_2 - energy_1)).
void update_points_of_one_channel(const PixelJob& job) {
  for (int64_t tile = job.begin; tile < job.end; ++tile) {
    float q[kTile];
    for (int32_t lane = 0; lane < kTile; lane += kLanes) {
      const int64_t p = tile * kTile + lane;
      VFloat energy = load_raw<VFloat>(job.negative_unary + p);
      for (int32_t l = 0; l < job.count; ++l) {
        const LatticeView& lattice = job.lattices[l];
        if (lattice.values == nullptr) continue;
        VFloat sliced = sliced_one(lattice, p);
        if (lattice.after != nullptr) sliced *= load_raw<VFloat>(lattice.after + p);
        energy += lattice.strength * (sliced + sliced - load_raw<VFloat>(lattice.ones + p));
      }
      const VFloat e = exp_of_negative<VFloat, VInt32>(energy < 0 ? energy : -energy);
      const VFloat small = e / (e + 1.0f);
      store_raw(q + lane, energy < 0 ? small : 1.0f - small);
      if (job.probabilities != nullptr) store_raw(job.probabilities + p, load_raw<VFloat>(q + lane));
    }
    for (int32_t l = 0; l < job.count; ++l) {
      const LatticeView& lattice = job.lattices[l];
      if (lattice.splat == nullptr) continue;
      float value[kTile];
      for (int32_t k = 0; k < kTile; ++k) value[k] = lattice.before == nullptr ? q[k] : q[k] * lattice.before[tile * kTile + k];
      splat_one(lattice, tile, value);
    }
  }
}

void update(const PixelJob& job, float* energies) {
  if (job.channels == 1) {
    update_points_of_one_channel(job);
  } else {
    update_points(job, energies);
  }
}

// Of one channel, over tiles [begin, end): result = slice(values).
void slice_tiles(const LatticeView& lattice, int64_t begin, int64_t end, float* result) {
  for (int64_t p = begin * kTile; p < end * kTile; p += kLanes) store_raw(result + p, sliced_one(lattice, p));
}

// lattice.splat += input, or 1 where that is null.
void splat_tiles(const LatticeView& lattice, int64_t begin, int64_t end, const float* input) {
  float ones[kTile];
  for (float& one : ones) one = 1;
  for (int64_t tile = begin; tile < end; ++tile) {
    splat_one(lattice, tile, input == nullptr ? ones : input + tile * kTile);
  }
}
