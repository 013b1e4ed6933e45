// The lattice's kernels, one body for every tier: included after kernels.inl's helpers, inside the tier's unnamed
// namespace. Layouts in lattice.h.

// A vector of up to kWidth floats.
template <int kWidth>
struct Lanes {
  static constexpr int count = kWidth < kLanes ? kWidth : kLanes;
  typedef float V __attribute__((vector_size(count * 4)));
  typedef int32_t I __attribute__((vector_size(count * 4)));
};

// kWidth floats, in as many vectors as that takes.
template <int kWidth>
struct Row {
  using V = typename Lanes<kWidth>::V;
  static constexpr int lanes = Lanes<kWidth>::count, parts = kWidth / lanes;
  V part[parts];

  static RIBFAST_INLINE Row load(const float* p) {
    Row row;
    for (int i = 0; i < parts; ++i) row.part[i] = load_raw<V>(p + i * lanes);
    return row;
  }
  static RIBFAST_INLINE Row zero() {
    Row row;
    for (int i = 0; i < parts; ++i) row.part[i] = V{};
    return row;
  }
  RIBFAST_INLINE void store(float* p) const {
    for (int i = 0; i < parts; ++i) store_raw(p + i * lanes, part[i]);
  }
  // this += factor * other
  RIBFAST_INLINE void add(float factor, const Row& other) {
    for (int i = 0; i < parts; ++i) part[i] += factor * other.part[i];
  }
  RIBFAST_INLINE void scale(float factor) {
    for (int i = 0; i < parts; ++i) part[i] *= factor;
  }
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

// A product that is rounded before it is added to anything. Positions on the lattice reach hundreds of cells:
// contracted, they would move by 1e-5 of a cell, and mean field makes a hundred times that of it where labels are in
// balance.
RIBFAST_INLINE VFloat rounded(VFloat product) {
#if defined(__x86_64__)
  asm("" : "+v"(product));  // opaque to the compiler, free at run time
#endif
  return product;
}

typedef uint64_t VKey __attribute__((vector_size(RIBFAST_VECTOR_BYTES)));  // half as many lanes as of float
constexpr int kKeyLanes = kLanes / 2;

// The lanes [half * kKeyLanes, ...) of int32 numbers, widened.
RIBFAST_INLINE VKey widened_half(VInt32 numbers, int half) {
  typedef int32_t Half __attribute__((vector_size(RIBFAST_VECTOR_BYTES / 2)));
  int32_t lanes[kLanes];
  store_raw(lanes, numbers);
  return bits<VKey>(__builtin_convertvector(load_raw<Half>(lanes + half * kKeyLanes), VInt64));
}

// Bit k: lane k is not 0.
RIBFAST_INLINE uint32_t lanes_set(VKey v) {
#if RIBFAST_VECTOR_BYTES == 64
  return _mm512_test_epi64_mask(bits<__m512i>(v), bits<__m512i>(v));
#else
  uint32_t set = 0;
  for (int k = 0; k < kKeyLanes; ++k) set |= static_cast<uint32_t>(v[k] != 0) << k;
  return set;
#endif
}

// Of the lanes that `wanted` sets; the others are 0 or whatever stands at their index.
RIBFAST_INLINE VKey gather(const uint64_t* from, VKey index, VKey wanted) {
#if RIBFAST_VECTOR_BYTES == 64
  const auto mask = static_cast<__mmask8>(lanes_set(wanted));
  return bits<VKey>(_mm512_mask_i64gather_epi64(_mm512_setzero_si512(), mask, bits<__m512i>(index), from, 8));
#elif RIBFAST_VECTOR_BYTES == 32
  return bits<VKey>(_mm256_i64gather_epi64(reinterpret_cast<const long long*>(from), bits<__m256i>(index), 8));
#else
  VKey v;
  for (int k = 0; k < kKeyLanes; ++k) v[k] = from[index[k]];
  return v;
#endif
}

RIBFAST_INLINE int32_t find_vertex(const VertexSlots& table, uint64_t key) {
  uint64_t hash = key * kHashFactor;
  hash ^= hash >> kHashFold;
  for (uint64_t at = hash >> table.shift;; at = (at + 1) & table.mask) {
    const uint64_t slot = table.slots[at], vertex = slot >> 32;
    if (vertex == 0) return 0;
    if (static_cast<uint32_t>(slot) == static_cast<uint32_t>(hash) && table.keys[vertex] == key) {
      return static_cast<int32_t>(vertex);
    }
  }
}

// found[i]: the vertex of keys[i] + move, or 0. Nearly all are found, or known to be absent, at their slot or the next.
void find(const VertexSlots& table, const uint64_t* keys, uint64_t move, int64_t count, int32_t* found) {
  int64_t i = 0;
  for (; i + kKeyLanes <= count; i += kKeyLanes) {
    const VKey key = load_raw<VKey>(keys + i) + move;
    VKey hash = key * kHashFactor;
    hash ^= hash >> kHashFold;
    const VKey at = hash >> table.shift, low = VKey{} + 0xffffffffull, tag = hash & low;
    const VKey one = gather(table.slots, at, ~VKey{});
    const VKey at_one = bits<VKey>((one & low) == tag) | bits<VKey>((one >> 32) == 0);
    const VKey two = gather(table.slots, (at + 1) & table.mask, ~at_one);
    const VKey at_two = bits<VKey>((two & low) == tag) | bits<VKey>((two >> 32) == 0);
    const VKey vertex = ((at_one & one) | (~at_one & two)) >> 32;
    const VKey there = bits<VKey>(vertex != 0), wrong = there & (gather(table.keys, vertex, there) ^ key);
    typedef int32_t Half __attribute__((vector_size(RIBFAST_VECTOR_BYTES / 2)));
    store_raw(found + i, __builtin_convertvector(bits<VInt64>(vertex), Half));
    for (uint32_t open = lanes_set(~(at_one | at_two) | wrong); open != 0; open &= open - 1) {
      const int k = __builtin_ctz(open);
      found[i + k] = find_vertex(table, keys[i + k] + move);
    }
  }
  for (; i < count; ++i) found[i] = find_vertex(table, keys[i] + move);
}

template <int kDims>
void embed_points(const EmbedJob& job) {
  constexpr int kCorners = kDims + 1;
  using V = VFloat;
  using I = VInt32;
  const float down = 1.0f / kCorners;
  const V shift = V{} + 12582912.0f;
  const int64_t keys_of_tile = int64_t{job.words} * kCorners * kTile;
  for (int64_t begin = job.begin * kTile; begin < job.end * kTile; begin += kLanes) {
    const int64_t tile = begin / kTile, lane = begin % kTile;
    V elevated[kCorners], sum = V{};
    for (int j = kDims; j > 0; --j) {
      const float* from = job.features + (j - 1) * job.feature_stride + (begin - job.begin * kTile);
      V feature = V{};
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
    // Corner r lies one further in every coordinate than corner r - 1, and dims + 1 back where the rank is dims + 1 -
    // r.
    for (int half = 0; half < 2; ++half) {
      VKey rank_of[kDims], place[kDims];
      for (int i = 0; i < kDims; ++i) {
        rank_of[i] = widened_half(rank[i], half);
        place[i] = widened_half(__builtin_convertvector(nearest[i], I) - job.lowest[i], half);
      }
      for (int word = 0; word < job.words; ++word) {
        VKey key = VKey{};
        uint64_t ones = 0;
        for (int i = 0; i < kDims; ++i) key += place[i] * job.unit[i][word], ones += job.unit[i][word];
        uint64_t* out = job.keys + (tile - job.begin) * keys_of_tile + word * kCorners * kTile + lane;
        out += half * kKeyLanes;
        store_raw(out, key);
        for (int r = 1; r < kCorners; ++r) {
          key += ones;
          for (int i = 0; i < kDims; ++i) {
            const VKey here = bits<VKey>(rank_of[i] == static_cast<uint64_t>(kCorners - r));
            key -= here & (job.unit[i][word] * kCorners);
          }
          store_raw(out + r * kTile, key);
        }
      }
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

// Calls f(width, first channel) for the blocks of the channels.
template <typename F>
RIBFAST_INLINE void over_blocks(int32_t channels, F&& f) {
  if (channels == 1) return f(Constant<1>(), 0);
  int32_t c = 0;
  for (; c + 16 <= channels; c += 16) f(Constant<16>(), c);
  if (channels & 8) f(Constant<8>(), c), c += 8;
  if (channels & 4) f(Constant<4>(), c);
}

// from[index / (4 / kScale)], for indices that kScale makes offsets in bytes.
template <int kScale>
RIBFAST_INLINE VFloat gather(const float* from, VInt32 index) {
#if RIBFAST_VECTOR_BYTES == 64
  return bits<VFloat>(_mm512_i32gather_ps(bits<__m512i>(index), from, kScale));
#elif RIBFAST_VECTOR_BYTES == 32
  return bits<VFloat>(_mm256_i32gather_ps(from, bits<__m256i>(index), kScale));
#else
  VFloat v;
  for (int k = 0; k < kLanes; ++k) v[k] = from[index[k] / (4 / kScale)];
  return v;
#endif
}

// Blur along one axis, in place: v' = v + (before + after) / 2, over lines of neighbours. `width`: floats from one
// vertex to the next, in blocks of kWidth. Lines of kLength vertices, one after the other:
template <int kWidth, int kLength>
RIBFAST_INLINE void blur_lines(float* values, const int32_t* links, int64_t begin, int64_t end, int32_t width) {
  constexpr int64_t kAhead = kLinksAhead / 2;
  using R = Row<kWidth>;
  for (int64_t i = begin; i < end; i += kLength) {
    float* at[kLength];
    for (int k = 0; k < kLength; ++k) at[k] = values + int64_t{links[i + k]} * width;
    for (int32_t first = 0; first < width; first += kWidth) {
      R line[kLength];
      for (int k = 0; k < kLength; ++k) {
        __builtin_prefetch(values + int64_t{links[i + kAhead + k]} * width + first, 1);
        line[k] = R::load(at[k] + first);
      }
      for (int k = 0; k < kLength; ++k) {
        R result;
        for (int j = 0; j < R::parts; ++j) {
          const auto before = k > 0 ? line[k - 1].part[j] : typename R::V{};
          const auto after = k + 1 < kLength ? line[k + 1].part[j] : typename R::V{};
          result.part[j] = line[k].part[j] + 0.5f * (before + after);
        }
        result.store(at[k] + first);
      }
    }
  }
}

// Lines of any length, each closed by a 0; a closing 0 is written to `spare`, a vertex that nobody reads.
template <int kWidth>
RIBFAST_INLINE void blur_long_lines(float* values, const int32_t* links, int64_t begin, int64_t end, int32_t width,
                                    int32_t spare) {
  constexpr int64_t kAhead = kLinksAhead / 2;
  using R = Row<kWidth>;
  for (float* block = values; block < values + width; block += kWidth) {
    R before = R::zero(), self = R::load(block + int64_t{links[begin]} * width);
    for (int64_t i = begin; i < end; ++i) {
      const int32_t id = links[i];
      __builtin_prefetch(block + int64_t{links[i + kAhead]} * width, 1);
      const R after = R::load(block + int64_t{i + 1 < end ? links[i + 1] : 0} * width);  // the next is another's
      R result;
      for (int k = 0; k < R::parts; ++k) result.part[k] = self.part[k] + 0.5f * (before.part[k] + after.part[k]);
      result.store(block + int64_t{id != 0 ? id : spare} * width);
      before = self, self = after;
    }
  }
}

template <int kWidth>
RIBFAST_INLINE void blur_blocks(float* values, const int32_t* links, int64_t begin, int64_t end, int32_t length,
                                int32_t width, int32_t spare) {
  static_assert(kLongestLine == 8);
  switch (length) {
    case 2: return blur_lines<kWidth, 2>(values, links, begin, end, width);
    case 3: return blur_lines<kWidth, 3>(values, links, begin, end, width);
    case 4: return blur_lines<kWidth, 4>(values, links, begin, end, width);
    case 5: return blur_lines<kWidth, 5>(values, links, begin, end, width);
    case 6: return blur_lines<kWidth, 6>(values, links, begin, end, width);
    case 7: return blur_lines<kWidth, 7>(values, links, begin, end, width);
    case 8: return blur_lines<kWidth, 8>(values, links, begin, end, width);
    default: return blur_long_lines<kWidth>(values, links, begin, end, width, spare);
  }
}

void blur(float* values, const int32_t* links, int64_t begin, int64_t end, int32_t length, int32_t spare,
          int32_t width) {
  switch (width) {
    case 1: return blur_blocks<1>(values, links, begin, end, length, 1, spare);
    case 4: return blur_blocks<4>(values, links, begin, end, length, 4, spare);
    case 8: return blur_blocks<8>(values, links, begin, end, length, 8, spare);
    case 16: return blur_blocks<16>(values, links, begin, end, length, 16, spare);
    default: return blur_blocks<16>(values, links, begin, end, length, width, spare);
  }
}

// One channel: out = in + (in[before] + in[after]) / 2 for vertices [begin, end), from one buffer to another; what lies
// between `end` and the next multiple of kTile is written too.
void blur_one(const float* in, const int32_t* before, const int32_t* after, int64_t begin, int64_t end, float* out) {
  for (int64_t v = begin; v < end; v += kLanes) {
    const VFloat sides = gather<4>(in, load_raw<VInt32>(before + v)) + gather<4>(in, load_raw<VInt32>(after + v));
    store_raw(out + v, load_raw<VFloat>(in + v) + 0.5f * sides);
  }
}

// Where the values of a block of channels begin, and how many floats there are from one vertex to the next.
template <int kWidth, typename T>
struct VertexBlock {
  T* values;
  int32_t width;

  RIBFAST_INLINE VertexBlock(T* all, int64_t stride, int32_t first, int32_t channels)
      : values(all + (kWidth == 16 ? first : first * stride)), width(kWidth == 16 ? channels / 16 * 16 : kWidth) {}
  RIBFAST_INLINE T* at(int32_t corner) const {
    static_assert(kCornerScale == 4);  // a vertex's number times it and the width are bytes
    const int64_t bytes = int64_t{corner} * (kWidth == 16 ? width : kWidth);
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(values) + bytes);
  }
};

constexpr float slice_scale(int dims) { return 1.0f / (1.0f + 1.0f / static_cast<float>(1 << dims)); }

// Each point's weighted sum over its corners. Everything is a copy in registers: the compiler cannot know that what is
// stored is none of what is read.
template <int kWidth, int kCorners, bool kExact>
RIBFAST_INLINE Row<kWidth> sliced(const int32_t* corners, const float* weights,
                                  const VertexBlock<kWidth, const float>& block) {
  constexpr float alpha = slice_scale(kCorners - 1);
  Row<kWidth> sum = Row<kWidth>::zero();
  for (int r = 0; r < kCorners; ++r) {
    const float weight = kExact ? weights[r * kTile] * alpha : weights[r * kTile];
    sum.add(weight, Row<kWidth>::load(block.at(corners[r * kTile])));
  }
  return sum;
}

// Lane k of the result is numbers[k / kWidth].
template <int kWidth>
RIBFAST_INLINE VFloat spread(const float* numbers) {
#if RIBFAST_VECTOR_BYTES == 64
  if constexpr (kWidth == 8) {
    const VInt32 halves = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    const __m128 two = bits<__m128>(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(numbers)));
    return bits<VFloat>(_mm512_permutexvar_ps(bits<__m512i>(halves), _mm512_castps128_ps512(two)));
  } else if constexpr (kWidth == 4) {
    const VInt32 quarters = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    return bits<VFloat>(_mm512_permutexvar_ps(bits<__m512i>(quarters), _mm512_castps128_ps512(_mm_loadu_ps(numbers))));
  }
#elif RIBFAST_VECTOR_BYTES == 32
  if constexpr (kWidth == 4) {
    const VInt32 halves = {0, 0, 0, 0, 1, 1, 1, 1};
    const __m128 two = bits<__m128>(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(numbers)));
    return bits<VFloat>(_mm256_permutevar8x32_ps(_mm256_castps128_ps256(two), bits<__m256i>(halves)));
  }
#endif
  return VFloat{} + numbers[0];
}

// Narrow rows side by side in one vector: a vector that is written in parts would wait for them when it is read.
template <int kWidth>
RIBFAST_INLINE VFloat joined(const Row<kWidth>* rows) {
#if RIBFAST_VECTOR_BYTES == 64
  if constexpr (kWidth == 8) {
    const __m512 low = _mm512_castps256_ps512(bits<__m256>(rows[0].part[0]));
    return bits<VFloat>(_mm512_insertf32x8(low, bits<__m256>(rows[1].part[0]), 1));
  } else {
    __m512 all = _mm512_castps128_ps512(bits<__m128>(rows[0].part[0]));
    all = _mm512_insertf32x4(all, bits<__m128>(rows[1].part[0]), 1);
    all = _mm512_insertf32x4(all, bits<__m128>(rows[2].part[0]), 2);
    return bits<VFloat>(_mm512_insertf32x4(all, bits<__m128>(rows[3].part[0]), 3));
  }
#elif RIBFAST_VECTOR_BYTES == 32
  const __m256 low = _mm256_castps128_ps256(bits<__m128>(rows[0].part[0]));
  return bits<VFloat>(_mm256_insertf128_ps(low, bits<__m128>(rows[1].part[0]), 1));
#else
  return rows[0].part[0];
#endif
}

// rows = base + strength * after * slice, of one tile and part; base null: 0.
template <bool kExact>
RIBFAST_INLINE void slice_rows(const LatticeView& lattice, const float* values, int64_t tile, int32_t channels,
                               float strength, const float* after_of, const float* base, float* rows) {
  with_corners(lattice.dims, [&](auto count) {
    constexpr int kCorners = decltype(count)::value;
    const int32_t* corners = lattice.corners + tile * kCorners * kTile;
    const float* weights = lattice.weights + tile * kCorners * kTile;
    float factor[kTile];
    for (int k = 0; k < kTile; ++k) {
      const float after = after_of == nullptr ? 1.0f : after_of[tile * kTile + k];
      factor[k] = kExact ? after : strength * slice_scale(kCorners - 1) * after;
    }
    over_blocks(channels, [&](auto width, int32_t first) {
      constexpr int kWidth = decltype(width)::value;
      const VertexBlock<kWidth, const float> block(values, lattice.stride, first, channels);
      if constexpr (kWidth > 1 && kWidth < kLanes) {
        for (int k = 0; k < kTile; k += kLanes / kWidth) {
          const int64_t at = first * kTile + k * kWidth;
          Row<kWidth> points[kLanes / kWidth];
          for (int i = 0; i < kLanes / kWidth; ++i) {
            points[i] = sliced<kWidth, kCorners, kExact>(corners + k + i, weights + k + i, block);
          }
          const VFloat message = joined<kWidth>(points) * spread<kWidth>(factor + k);
          const VFloat sum = base == nullptr ? VFloat{} : load_raw<VFloat>(base + at);
          store_raw(rows + at, sum + (kExact ? strength : 1.0f) * message);
        }
        return;
      }
      for (int k = 0; k < kTile; ++k) {
        const int64_t at = first * kTile + k * kWidth;
        Row<kWidth> sum = base == nullptr ? Row<kWidth>::zero() : Row<kWidth>::load(base + at);
        Row<kWidth> message = sliced<kWidth, kCorners, kExact>(corners + k, weights + k, block);
        if constexpr (kExact) {
          message.scale(factor[k]);
          sum.add(strength, message);
        } else {
          sum.add(factor[k], message);
        }
        sum.store(rows + at);
      }
    });
  });
}

// lattice.splat += factor * rows + shift, of one tile and part; factor and shift: one for each point.
RIBFAST_INLINE void splat_rows(const LatticeView& lattice, float* splat, int64_t tile, int32_t channels,
                               const float* factor, const float* shift, const float* rows) {
  with_corners(lattice.dims, [&](auto count) {
    constexpr int kCorners = decltype(count)::value;
    const int32_t* corners = lattice.corners + tile * kCorners * kTile;
    const float* weights = lattice.weights + tile * kCorners * kTile;
    over_blocks(channels, [&](auto width, int32_t first) {
      constexpr int kWidth = decltype(width)::value;
      const VertexBlock<kWidth, float> block(splat, lattice.stride, first, channels);
      for (int k = 0; k < kTile; ++k) {
        Row<kWidth> value = Row<kWidth>::load(rows + first * kTile + k * kWidth);
        for (auto& part : value.part) part = part * factor[k] + shift[k];
        for (int r = 0; r < kCorners; ++r) {
          float* vertex = block.at(corners[r * kTile + k]);
          Row<kWidth> sum = Row<kWidth>::load(vertex);
          sum.add(weights[r * kTile + k], value);
          sum.store(vertex);
        }
      }
    });
  });
}

// Lane k of the result is lane k ^ kStep.
template <int kStep>
RIBFAST_INLINE VFloat swapped_lanes(VFloat v) {
#if RIBFAST_VECTOR_BYTES == 64
  const __m512 x = bits<__m512>(v);
  if constexpr (kStep < 4) return bits<VFloat>(_mm512_permute_ps(x, kStep == 1 ? 0xb1 : 0x4e));
  return bits<VFloat>(_mm512_shuffle_f32x4(x, x, kStep == 4 ? 0xb1 : 0x4e));
#elif RIBFAST_VECTOR_BYTES == 32
  const __m256 x = bits<__m256>(v);
  if constexpr (kStep < 4) return bits<VFloat>(_mm256_permute_ps(x, kStep == 1 ? 0xb1 : 0x4e));
  return bits<VFloat>(_mm256_permute2f128_ps(x, x, 1));
#else
  return kStep == 1 ? __builtin_shuffle(v, VInt32{1, 0, 3, 2}) : __builtin_shuffle(v, VInt32{2, 3, 0, 1});
#endif
}

// f over neighbouring lanes in groups of kGroup, the result in every lane of the group.
template <int kGroup, typename F>
RIBFAST_INLINE VFloat over_group(VFloat v, F&& f) {
  if constexpr (kGroup > 1) v = f(v, swapped_lanes<1>(v));
  if constexpr (kGroup > 2) v = f(v, swapped_lanes<2>(v));
  if constexpr (kGroup > 4) v = f(v, swapped_lanes<4>(v));
  if constexpr (kGroup > 8) v = f(v, swapped_lanes<8>(v));
  return v;
}

struct Larger {
  template <class V>
  RIBFAST_INLINE V operator()(V a, V b) const {
    return b > a ? b : a;
  }
};
struct Sum {
  template <class V>
  RIBFAST_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};

// 1 / v for v >= 1, to a float's accuracy.
RIBFAST_INLINE VFloat reciprocal(VFloat v) {
#if RIBFAST_VECTOR_BYTES == 64
  const VFloat guess = bits<VFloat>(_mm512_rcp14_ps(bits<__m512>(v)));
  return guess + guess * (1.0f - v * guess);
#else
  return 1.0f / v;
#endif
}

// Softmax of labellings of kGroup channels in a row, in place over `size` floats of rows. differences: of the
// probabilities from the left-out label's, for the splat in reduced form; left_out_probabilities: where these go, or
// null.
template <int kGroup>
RIBFAST_INLINE void softmax_of_groups(float* rows, int64_t size, bool reduced, bool differences,
                                      float* left_out_probabilities) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const VFloat energy = load_raw<VFloat>(rows + i);
    VFloat top = over_group<kGroup>(energy, Larger()), left_out = VFloat{};
    if (reduced) {
      top = top > 0.0f ? top : VFloat{};
      left_out = exp_of_negative<VFloat, VInt32>(-top);
    }
    VFloat e = exp_of_negative<VFloat, VInt32>(energy - top);
    const VFloat sum = over_group<kGroup>(e, Sum()) + left_out;
    const VFloat share = reciprocal(sum);
    if (differences) e -= left_out;
    store_raw(rows + i, e * share);
    if (left_out_probabilities != nullptr) store_raw(left_out_probabilities + i, left_out * share);
  }
}

// result[k] = f over the kWidth channels of point k of a block and result[k].
template <int kWidth, typename F>
RIBFAST_INLINE void fold_block(const float* block, F&& f, float* result) {
  if constexpr (kWidth <= kLanes) {
    for (int i = 0; i < kTile * kWidth; i += kLanes) {
      float folded[kLanes];
      store_raw(folded, over_group<kWidth>(load_raw<VFloat>(block + i), f));
      for (int k = 0; k < kLanes / kWidth; ++k) {
        result[i / kWidth + k] = f(result[i / kWidth + k], folded[k * kWidth]);
      }
    }
  } else {
    for (int k = 0; k < kTile; ++k) {
      const Row<kWidth> row = Row<kWidth>::load(block + k * kWidth);
      VFloat all = row.part[0];
      for (int i = 1; i < Row<kWidth>::parts; ++i) all = f(all, row.part[i]);
      result[k] = f(result[k], over_group<kLanes>(all, f)[0]);
    }
  }
}

// Softmax of one labelling of many channels, all but its division: rows become exp(energy - top), to be multiplied with
// share[k]; left_out[k]: what stands for the left-out label, 0 where there is none.
RIBFAST_INLINE void softmax_of_rows(float* rows, int32_t channels, bool reduced, const float* left_out_energies,
                                    float* share, float* left_out) {
  float last[kTile], top[kTile], sum[kTile];
  for (int k = 0; k < kTile; ++k) {
    last[k] = !reduced ? -kInfinity<float> : left_out_energies == nullptr ? 0.0f : left_out_energies[k];
    top[k] = last[k], sum[k] = 0;
  }
  over_blocks(channels, [&](auto width, int32_t first) {
    constexpr int kWidth = decltype(width)::value;
    if constexpr (kWidth > 1) fold_block<kWidth>(rows + first * kTile, Larger(), top);
  });
  over_blocks(channels, [&](auto width, int32_t first) {
    constexpr int kWidth = decltype(width)::value;
    if constexpr (kWidth > 1) {
      using R = Row<(kWidth < kLanes ? kLanes : kWidth)>;  // whole vectors, of several points where they are narrow
      constexpr int kPoints = kWidth < kLanes ? kLanes / kWidth : 1;
      float* block = rows + first * kTile;
      for (int k = 0; k < kTile; k += kPoints) {
        R row = R::load(block + k * kWidth);
        const VFloat tops = spread<kWidth>(top + k);
        for (auto& part : row.part) part = exp_of_negative<VFloat, VInt32>(part - tops);
        row.store(block + k * kWidth);
      }
      fold_block<kWidth>(block, Sum(), sum);
    }
  });
  for (int k = 0; k < kTile; k += kLanes) {
    VFloat rest = VFloat{};
    if (reduced) rest = exp_of_negative<VFloat, VInt32>(load_raw<VFloat>(last + k) - load_raw<VFloat>(top + k));
    store_raw(left_out + k, rest);
    store_raw(share + k, 1.0f / (load_raw<VFloat>(sum + k) + rest));
  }
}

// Calls f with the address in rows of each channel of point k, ascending.
template <typename F>
RIBFAST_INLINE void over_channels(int32_t channels, int k, F&& f) {
  over_blocks(channels, [&](auto width, int32_t first) {
    constexpr int kWidth = decltype(width)::value;
    for (int c = 0; c < kWidth; ++c) f(first + c, first * kTile + k * kWidth + c);
  });
}

// The same by the C library's exponential, summed in the labels' order and divided.
void exact_softmax_of_rows(float* rows, int32_t channels) {
  for (int k = 0; k < kTile; ++k) {
    float top = -kInfinity<float>, sum = 0;
    over_channels(channels, k, [&](int32_t, int64_t at) { top = rows[at] > top ? rows[at] : top; });
    over_channels(channels, k, [&](int32_t, int64_t at) { sum += rows[at] = __builtin_expf(rows[at] - top); });
    over_channels(channels, k, [&](int32_t, int64_t at) { rows[at] /= sum; });
  }
}

// Where the first point's value of a channel stands in the rows of a tile and part; the next point's is `width`
// further.
struct RowPlace {
  int64_t at;
  int32_t width;
};
RIBFAST_INLINE RowPlace row_place(int32_t channel, int32_t channels) {
  RowPlace place = {0, 1};
  over_blocks(channels, [&](auto width, int32_t first) {
    constexpr int kWidth = decltype(width)::value;
    if (channel >= first && channel < first + kWidth) place = {int64_t{first} * kTile + channel - first, kWidth};
  });
  return place;
}

// Negative energies of a tile from its given labels.
void energies_of_labels(const PixelJob& job, int64_t tile, float* rows) {
  const int32_t used = job.labels - job.reduced, all = job.channels * job.parts;
  for (int32_t i = 0; i < all * kTile; ++i) rows[i] = -kInfinity<float>;
  const int32_t each = job.group == 0 ? job.channels : job.group;  // channels of a labelling
  for (int32_t n = 0; n < job.labellings; ++n) {
    const uint8_t* labels = job.given + n * job.given_stride + tile * kTile;
    float gain[kTile], other[kTile];
    for (int k = 0; k < kTile; ++k) {
      const float given = labels[k] == job.unsure ? job.otherwise : job.gain;
      const float last = !job.reduced ? 0.0f : labels[k] == used ? given : job.otherwise;
      gain[k] = given - last, other[k] = job.otherwise - last;
    }
    const int32_t part = n * each / job.channels, from = n * each % job.channels;
    for (int32_t c = 0; c < used; ++c) {
      const RowPlace place = row_place(from + c, job.channels);
      float* to = rows + int64_t{part} * job.channels * kTile + place.at;
      for (int k = 0; k < kTile; ++k) to[k * place.width] = labels[k] == c ? gain[k] : other[k];
    }
  }
}

// Sets the vertices that a tile touches first to 0, and asks for those that a later one reads first.
void prepare_vertices(const LatticeView& lattice, int64_t tile, int64_t end, int32_t part, int32_t channels) {
  constexpr int64_t kAhead = 3;
  const int64_t first = lattice.touched[tile], last = lattice.touched[tile + 1];
  const bool read = lattice.values != nullptr && tile + kAhead < end;
  const int32_t* ahead = lattice.touched + (read ? tile + kAhead : tile);
  const int64_t soon = ahead[0], later = ahead[read];
  const int64_t own = int64_t{part} * channels * lattice.stride;
  const auto prepare = [&](int64_t block, int32_t width) {
    float* splat = lattice.splat + own + block;
    const float* values = (read ? lattice.values : lattice.splat) + own + block;
    for (int64_t i = first * width; i < last * width; i += 4) store_raw(splat + i, Row<4>::zero());
    for (int64_t i = soon * width; i < later * width; i += 16) __builtin_prefetch(values + i, 0, 2);
  };
  const int32_t whole = channels / 16 * 16;
  if (whole > 0) prepare(0, whole);
  if (channels & 8) prepare(whole * lattice.stride, 8);
  if (channels & 4) prepare((whole + (channels & 8)) * lattice.stride, 4);
}

// rows = negative energies of a tile: the unary's and the messages.
RIBFAST_INLINE void energies_of_tile(const PixelJob& job, int64_t tile, float* rows) {
  const int64_t part_size = int64_t{kTile} * job.channels, size = part_size * job.parts;
  const float* base = job.negative_unary == nullptr ? rows : job.negative_unary + tile * size;
  if (job.negative_unary == nullptr) energies_of_labels(job, tile, rows);
  for (int32_t l = 0; l < job.count; ++l) {
    const LatticeView& lattice = job.lattices[l];
    for (int32_t part = 0; part < job.parts && lattice.touched != nullptr; ++part) {
      prepare_vertices(lattice, tile, job.end, part, job.channels);
    }
    if (lattice.values == nullptr) continue;
    for (int32_t part = 0; part < job.parts; ++part) {
      const float* values = lattice.values + part * job.channels * lattice.stride;
      const float* from = base + part * part_size;
      float* to = rows + part * part_size;
      if (job.exact) {
        slice_rows<true>(lattice, values, tile, job.channels, lattice.strength, lattice.after, from, to);
      } else {
        slice_rows<false>(lattice, values, tile, job.channels, lattice.strength, lattice.after, from, to);
      }
    }
    base = rows;
  }
  if (base != rows) __builtin_memcpy(rows, base, size * sizeof(float));
}

// Takes the softmax of a tile's rows where that is still to be taken, and splats them.
RIBFAST_INLINE void splat_of_tile(const PixelJob& job, int64_t tile, float* rows) {
  const float zeros[kTile] = {};
  float ones[kTile];
  for (float& one : ones) one = 1;
  for (int32_t part = 0; part < job.parts; ++part) {
    float* own = rows + int64_t{part} * kTile * job.channels;
    float share[kTile], left_out[kTile];
    const bool shared = !job.exact && job.group == 0;  // rows are then to be multiplied with `share`
    if (job.exact) exact_softmax_of_rows(own, job.channels);
    if (shared) {
      const float* last = job.left_out == nullptr ? nullptr : job.left_out + (tile * job.parts + part) * kTile;
      softmax_of_rows(own, job.channels, job.reduced, last, share, left_out);
    }
    for (int32_t l = 0; l < job.count; ++l) {
      const LatticeView& lattice = job.lattices[l];
      if (lattice.splat == nullptr) continue;
      const float *factor = lattice.before == nullptr ? ones : lattice.before + tile * kTile, *shift = zeros;
      float factors[kTile], shifts[kTile];
      if (shared) {
        for (int k = 0; k < kTile; ++k) factors[k] = share[k] * factor[k], shifts[k] = -left_out[k] * factors[k];
        factor = factors, shift = shifts;
      }
      splat_rows(lattice, lattice.splat + part * job.channels * lattice.stride, tile, job.channels, factor, shift, own);
    }
    if (job.probabilities == nullptr || !shared) continue;
    if (job.reduced) {
      float* to = job.left_out_probabilities + ((tile - job.begin) * job.parts + part) * kTile;
      for (int k = 0; k < kTile; ++k) to[k] = left_out[k] * share[k];
    }
    over_blocks(job.channels, [&](auto width, int32_t first) {
      constexpr int kWidth = decltype(width)::value;
      for (int k = 0; k < kTile * kWidth; ++k) own[first * kTile + k] *= share[k / kWidth];
    });
  }
}

// Vectors over channels. Few channels go kTogether tiles at a time: one tile's exponentials alone would not fill the
// time that each takes.
void update_points(const PixelJob& job, float* scratch) {
  const int64_t size = int64_t{kTile} * job.channels * job.parts;
  const int64_t together = job.group != 0 && job.channels <= 8 ? kTogether : 1;
  for (int64_t begin = job.begin; begin < job.end; begin += together) {
    const int64_t count = begin + together < job.end ? together : job.end - begin;
    float* rows = job.probabilities != nullptr ? job.probabilities + (begin - job.begin) * size : scratch;
    for (int64_t i = 0; i < count; ++i) energies_of_tile(job, begin + i, rows + i * size);
    const bool differences = job.reduced && job.probabilities == nullptr;
    const bool both = job.reduced && job.probabilities != nullptr;
    float* left_out = both && job.group != 0 ? job.left_out_probabilities + (begin - job.begin) * size : nullptr;
    if (job.group == 1) softmax_of_groups<1>(rows, count * size, job.reduced, differences, left_out);
    if (job.group == 2) softmax_of_groups<2>(rows, count * size, job.reduced, differences, left_out);
    if (job.group == 4) softmax_of_groups<4>(rows, count * size, job.reduced, differences, left_out);
    for (int64_t i = 0; i < count; ++i) splat_of_tile(job, begin + i, rows + i * size);
  }
}

// One channel: what points [lane, lane + kLanes) of a tile read.
template <int kCorners>
RIBFAST_INLINE VFloat sliced_one(const LatticeView& lattice, int64_t tile, int lane) {
  const int64_t at = tile * kCorners * kTile + lane;
  VFloat sum = VFloat{};
  for (int r = 0; r < kCorners; ++r) {
    sum += load_raw<VFloat>(lattice.weights + at + r * kTile) *
           gather<1>(lattice.values, load_raw<VInt32>(lattice.corners + at + r * kTile));
  }
  return sum * slice_scale(kCorners - 1);
}

RIBFAST_INLINE void splat_one(const LatticeView& lattice, int64_t tile, const float* value) {
  const VertexBlock<1, float> block(lattice.splat, lattice.stride, 0, 1);
  with_corners(lattice.dims, [&](auto count) {
    constexpr int kCorners = decltype(count)::value;
    const int32_t* corners = lattice.corners + tile * kCorners * kTile;
    const float* weights = lattice.weights + tile * kCorners * kTile;
    float weighted[kCorners][kTile];
    for (int r = 0; r < kCorners; ++r) {
      for (int k = 0; k < kTile; ++k) weighted[r][k] = weights[r * kTile + k] * value[k];
    }
    for (int k = 0; k < kTile; ++k) {
      for (int r = 0; r < kCorners; ++r) *block.at(corners[r * kTile + k]) += weighted[r][k];
    }
  });
}

// One channel (two labels, the second left out): vectors over points. What is splat is q_1 - q_2 = 2 q_1 - 1,
// q_1 = 1 / (1 + exp(-energy)).
void update_points_of_one_channel(const PixelJob& job) {
  float energies[kTogether * kTile], difference[kTogether * kTile];
  for (int64_t begin = job.begin; begin < job.end; begin += kTogether) {
    const int64_t end = begin + kTogether < job.end ? begin + kTogether : job.end, first = begin * kTile;
    const auto count = static_cast<int>((end - begin) * kTile);
    if (job.negative_unary != nullptr) {
      __builtin_memcpy(energies, job.negative_unary + first, count * sizeof(float));
    } else {
      for (int k = 0; k < count; ++k) {
        const int32_t label = job.given[first + k];
        const float gap = job.gain - job.otherwise;
        energies[k] = label == job.unsure || label > 1 ? 0.0f : label == 0 ? gap : -gap;
      }
    }
    for (int32_t l = 0; l < job.count; ++l) {
      const LatticeView& lattice = job.lattices[l];
      if (lattice.values == nullptr) continue;
      with_corners(lattice.dims, [&](auto corners) {
        for (int k = 0; k < count; k += kLanes) {
          VFloat message = sliced_one<decltype(corners)::value>(lattice, begin + k / kTile, k % kTile);
          if (lattice.after != nullptr) message *= load_raw<VFloat>(lattice.after + first + k);
          store_raw(energies + k, load_raw<VFloat>(energies + k) + lattice.strength * message);
        }
      });
    }
    for (int k = 0; k < count; k += kLanes) {
      const VFloat energy = load_raw<VFloat>(energies + k);
      const VFloat e = exp_of_negative<VFloat, VInt32>(energy < 0 ? energy : -energy);
      const VFloat share = reciprocal(e + 1.0f), small = e * share, gap = (1.0f - e) * share;
      store_raw(difference + k, energy < 0 ? -gap : gap);
      if (job.probabilities != nullptr) {
        const int64_t at = first - job.begin * kTile + k;
        store_raw(job.probabilities + at, energy < 0 ? small : 1.0f - small);
        store_raw(job.left_out_probabilities + at, energy < 0 ? 1.0f - small : small);
      }
    }
    for (int32_t l = 0; l < job.count; ++l) {
      const LatticeView& lattice = job.lattices[l];
      if (lattice.splat == nullptr) continue;
      for (int64_t tile = begin; tile < end; ++tile) {
        float value[kTile];
        __builtin_memcpy(value, difference + (tile - begin) * kTile, sizeof value);
        for (int k = 0; k < kTile && lattice.before != nullptr; ++k) value[k] *= lattice.before[tile * kTile + k];
        splat_one(lattice, tile, value);
      }
    }
  }
}

void update(const PixelJob& job, float* scratch) {
  if (job.channels == 1) {
    update_points_of_one_channel(job);
  } else {
    update_points(job, scratch);
  }
}

// rows (of tiles [begin, end)) = slice(values)
void slice_tiles(const LatticeView& lattice, int64_t begin, int64_t end, int32_t channels, float* rows) {
  for (int64_t tile = begin; tile < end; ++tile) {
    float* own = rows + (tile - begin) * kTile * channels;
    if (channels > 1) {
      slice_rows<true>(lattice, lattice.values, tile, channels, 1.0f, nullptr, nullptr, own);
    } else {
      with_corners(lattice.dims, [&](auto count) {
        for (int lane = 0; lane < kTile; lane += kLanes) {
          store_raw(own + lane, sliced_one<decltype(count)::value>(lattice, tile, lane));
        }
      });
    }
  }
}

// lattice.splat += rows (of tiles [begin, end)); null, with one channel: ones
void splat_tiles(const LatticeView& lattice, int64_t begin, int64_t end, int32_t channels, const float* rows) {
  float ones[kTile], zeros[kTile];
  for (int k = 0; k < kTile; ++k) ones[k] = 1, zeros[k] = 0;
  for (int64_t tile = begin; tile < end; ++tile) {
    const float* own = rows == nullptr ? ones : rows + (tile - begin) * kTile * channels;
    if (channels > 1) {
      splat_rows(lattice, lattice.splat, tile, channels, ones, zeros, own);
    } else {
      splat_one(lattice, tile, own);
    }
  }
}
