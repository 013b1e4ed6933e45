// Pairs of neighbouring pixels: their affinities by path maxima, IRN's losses, and the walk between them. Included by
// kernels.inl. Layouts: pairs.h.

// log(x) for finite x > 0 that is not subnormal, to 1 ulp; NaN for x <= 0 and NaN.
RIBFAST_INLINE VFloat log_of(VFloat x) {
  constexpr int32_t kHalfRoot = 0x3f3504f3;  // sqrt(0.5): mantissas are taken from there to sqrt(2)
  const VInt32 shifted = bits<VInt32>(bits<VUInt32>(x) + static_cast<uint32_t>(0x3f800000 - kHalfRoot));  // NaN wraps
  const VFloat exponent = __builtin_convertvector((shifted >> 23) - 127, VFloat);
  const VFloat f = bits<VFloat>((shifted & 0x007fffff) + kHalfRoot) - 1.0f;
  const VFloat s = f / (2.0f + f), z = s * s, w = z * z;
  const VFloat series = z * (0.66666662693f + w * 0.28498786688f) + w * (0.40000972152f + w * 0.24279078841f);
  const VFloat half_square = 0.5f * f * f;
  const VFloat result =
      s * (half_square + series) + exponent * 9.0580006145e-06f - half_square + f + exponent * 6.9313812256e-01f;
  return x > VFloat{} ? result : splat(__builtin_nanf(""));
}

RIBFAST_INLINE VInt32 lane_numbers() {
  VInt32 lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

RIBFAST_INLINE bool any(VInt32 mask) {
#if RIBFAST_VECTOR_BYTES == 64
  return _mm512_test_epi32_mask(bits<__m512i>(mask), bits<__m512i>(mask)) != 0;
#elif RIBFAST_VECTOR_BYTES == 32
  return !_mm256_testz_si256(bits<__m256i>(mask), bits<__m256i>(mask));
#else
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
#endif
}

// The largest boundary on pair p's path from each lane's pixel. A NaN has been stored as infinity.
template <int kBlocks>
RIBFAST_INLINE void path_maximum(const PairTable& pairs, int32_t p, const float* at, VFloat* top) {
  const int32_t *cell = pairs.cells + pairs.first[p], *end = pairs.cells + pairs.first[p + 1];
  for (int b = 0; b < kBlocks; ++b) top[b] = load_raw<VFloat>(at + *cell + b * kLanes);
  while (++cell < end) {
    for (int b = 0; b < kBlocks; ++b) {
      const VFloat v = load_raw<VFloat>(at + *cell + b * kLanes);
      top[b] = v > top[b] ? v : top[b];
    }
  }
}

RIBFAST_INLINE VFloat affinity_of(VFloat top) {
  const VFloat a = 1.0f - top;
  const VFloat kept = a > VFloat{} ? a : VFloat{};
  return top < splat(__builtin_inff()) ? kept : splat(__builtin_nanf(""));
}

// a ** beta
struct Power {
  float beta;
  int32_t whole;  // beta where it is a small whole number, else 0

  explicit Power(double beta_) : beta(static_cast<float>(beta_)), whole(0) {
    if (beta_ >= 1 && beta_ <= 64 && beta_ == static_cast<int32_t>(beta_)) whole = static_cast<int32_t>(beta_);
  }

  RIBFAST_INLINE VFloat operator()(VFloat a) const {
    if (whole) {
      VFloat result = splat(1.0f);
      for (int32_t rest = whole; rest; rest >>= 1, a *= a) {
        if (rest & 1) result *= a;
      }
      return result;
    }
    for (int i = 0; i < kLanes; ++i) a[i] = __builtin_powf(a[i], beta);
    return a;
  }
};

RIBFAST_INLINE void store_some(float* p, VFloat v, int64_t count) {
  if (count >= kLanes) {
    store_raw(p, v);
  } else {
    __builtin_memcpy(p, &v, count * sizeof(float));
  }
}

RIBFAST_INLINE VFloat load_some(const float* p, int64_t count) {
  if (count >= kLanes) return load_raw<VFloat>(p);
  VFloat v{};
  __builtin_memcpy(&v, p, count * sizeof(float));
  return v;
}

// One row: row: the boundary at its column 0; out: of pair 0, pairs `plane` apart.
void path_affinity(const PairTable& pairs, const float* row, int64_t width, double beta, float* out, int64_t plane) {
  const Power power(beta);
  constexpr int kBlocks = 4;
  for (int32_t p = 0; p < pairs.count; ++p, out += plane) {
    int64_t x = 0;
    VFloat top[kBlocks];
    for (; x + kBlocks * kLanes <= width; x += kBlocks * kLanes) {
      path_maximum<kBlocks>(pairs, p, row + x, top);
      for (int b = 0; b < kBlocks; ++b) store_raw(out + x + b * kLanes, power(affinity_of(top[b])));
    }
    for (; x < width; x += kLanes) {
      path_maximum<1>(pairs, p, row + x, top);
      store_some(out + x, power(affinity_of(top[0])), width - x);
    }
  }
}

// Adds `value` where the path's first largest pixel is, into a plane laid out as the boundary's.
RIBFAST_INLINE void add_at_maximum(const PairTable& pairs, int32_t p, const float* at, VFloat top, VInt32 active,
                                   VFloat value, float* grad) {
  for (int32_t i = pairs.first[p]; i < pairs.first[p + 1]; ++i) {
    const int32_t cell = pairs.cells[i];
    const VInt32 hit = active & (load_raw<VFloat>(at + cell) == top);
    if (!any(hit)) continue;
    store_raw(grad + cell, load_raw<VFloat>(grad + cell) + bits<VFloat>(hit & bits<VInt32>(value)));
    active &= ~hit;
    if (!any(active)) return;
  }
}

// grad: of the row in pair 0's plane; result: the boundary's gradient at the row's column 0, added to.
void path_affinity_backward(const PairTable& pairs, const float* row, int64_t width, double beta, const float* grad,
                            int64_t plane, float* result) {
  const Power power(beta - 1);
  const VInt32 lanes = lane_numbers();
  for (int32_t p = 0; p < pairs.count; ++p, grad += plane) {
    for (int64_t x = 0; x < width; x += kLanes) {
      VFloat top;
      path_maximum<1>(pairs, p, row + x, &top);
      const VFloat a = affinity_of(top);
      VFloat slope = load_some(grad + x, width - x) * -static_cast<float>(beta);
      if (beta != 1) slope *= power(a);
      const VInt32 active = (lanes < static_cast<int32_t>(width - x)) & ((top <= splat(1.0f)) | (a != a));
      if (any(active)) add_at_maximum(pairs, p, row + x, top, active, slope, result + x);
    }
  }
}

// Which of a block's pairs there are, by their labels.
struct PairKinds {
  VInt32 background, foreground, other;

  RIBFAST_INLINE PairKinds(VInt32 here, VInt32 there, VInt32 inside) {
    const VInt32 known = inside & (here != 255) & (there != 255), alike = known & (here == there);
    background = alike & (here == 0), foreground = alike & (here != 0), other = known & ~alike;
  }
};

RIBFAST_INLINE VFloat keep(VInt32 mask, VFloat value) { return bits<VFloat>(mask & bits<VInt32>(value)); }
RIBFAST_INLINE VFloat magnitude(VFloat value) { return bits<VFloat>(bits<VInt32>(value) & 0x7fffffff); }
RIBFAST_INLINE VFloat sign_of(VFloat value) {
  return keep(value > VFloat{}, splat(1.0f)) - keep(value < VFloat{}, splat(1.0f));
}

constexpr float kLossEpsilon = 1e-5f;

// Adds a row's eight sums.
void pair_losses(const PairTable& pairs, const PairRow& row, double* sums) {
  const VInt32 lanes = lane_numbers();
  const int64_t end = row.width - (pairs.radius - 1);
  VFloat totals[5] = {};
  VInt32 minus_counts[3] = {};
  for (int64_t x = pairs.radius - 1; x < end; x += kLanes) {
    const VInt32 inside = lanes < static_cast<int32_t>(end - x < kLanes ? end - x : kLanes);
    const VInt32 here = load_raw<VInt32>(row.labels + x);
    if (!any(inside & (here != 255))) continue;
    const VFloat here_y = load_raw<VFloat>(row.displacement_y + x), here_x = load_raw<VFloat>(row.displacement_x + x);
    for (int32_t p = 0; p < pairs.count; ++p) {
      const int64_t other = x + pairs.y[p] * pairs.stride + pairs.x[p];
      const PairKinds kinds(here, load_raw<VInt32>(row.labels + other), inside);
      const VInt32 alike = kinds.background | kinds.foreground;
      if (!any(alike | kinds.other)) continue;
      VFloat top;
      path_maximum<1>(pairs, p, row.boundary + x, &top);
      const VFloat a = affinity_of(top);
      const VFloat loss = -log_of(alike ? a + kLossEpsilon : (1.0f + kLossEpsilon) - a);
      const VFloat move_y = here_y - load_raw<VFloat>(row.displacement_y + other);
      const VFloat move_x = here_x - load_raw<VFloat>(row.displacement_x + other);
      totals[0] += keep(kinds.background, loss);
      totals[1] += keep(kinds.foreground, loss);
      totals[2] += keep(kinds.other, loss);
      totals[3] += keep(kinds.foreground, magnitude(move_y - static_cast<float>(pairs.y[p])) +
                                              magnitude(move_x - static_cast<float>(pairs.x[p])));
      totals[4] += keep(kinds.background, magnitude(move_y) + magnitude(move_x));
      minus_counts[0] += kinds.background;
      minus_counts[1] += kinds.foreground;
      minus_counts[2] += kinds.other;
    }
  }
  for (int i = 0; i < 5; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) sums[i] += totals[i][lane];
  }
  for (int i = 0; i < 3; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) sums[5 + i] -= minus_counts[i][lane];
  }
}

// grads: of the five sums; the gradients of boundary and displacement, laid out as they are, are added to.
void pair_losses_backward(const PairTable& pairs, const PairRow& row, const float* grads, float* boundary,
                          float* displacement_y, float* displacement_x) {
  const VInt32 lanes = lane_numbers();
  const int64_t end = row.width - (pairs.radius - 1);
  const auto add = [](float* at, VFloat value) { store_raw(at, load_raw<VFloat>(at) + value); };
  for (int64_t x = pairs.radius - 1; x < end; x += kLanes) {
    const VInt32 inside = lanes < static_cast<int32_t>(end - x < kLanes ? end - x : kLanes);
    const VInt32 here = load_raw<VInt32>(row.labels + x);
    if (!any(inside & (here != 255))) continue;
    const VFloat here_y = load_raw<VFloat>(row.displacement_y + x), here_x = load_raw<VFloat>(row.displacement_x + x);
    VFloat total_y{}, total_x{};
    for (int32_t p = 0; p < pairs.count; ++p) {
      const int64_t other = x + pairs.y[p] * pairs.stride + pairs.x[p];
      const PairKinds kinds(here, load_raw<VInt32>(row.labels + other), inside);
      const VInt32 alike = kinds.background | kinds.foreground, known = alike | kinds.other;
      if (!any(known)) continue;
      VFloat top;
      path_maximum<1>(pairs, p, row.boundary + x, &top);
      const VFloat a = affinity_of(top);
      // d loss / d top, top = 1 - a
      const VFloat alike_grad = keep(kinds.background, splat(grads[0])) + keep(kinds.foreground, splat(grads[1]));
      const VFloat strength = alike_grad - keep(kinds.other, splat(grads[2]));
      const VFloat slope = strength / (alike ? a + kLossEpsilon : (1.0f + kLossEpsilon) - a);
      const VInt32 active = known & ((top <= splat(1.0f)) | (a != a));
      if (any(active)) add_at_maximum(pairs, p, row.boundary + x, top, active, slope, boundary + x);
      if (!any(alike)) continue;
      const VFloat move_y = here_y - load_raw<VFloat>(row.displacement_y + other);
      const VFloat move_x = here_x - load_raw<VFloat>(row.displacement_x + other);
      const VFloat to_y = keep(kinds.foreground, sign_of(move_y - static_cast<float>(pairs.y[p])) * grads[3]) +
                          keep(kinds.background, sign_of(move_y) * grads[4]);
      const VFloat to_x = keep(kinds.foreground, sign_of(move_x - static_cast<float>(pairs.x[p])) * grads[3]) +
                          keep(kinds.background, sign_of(move_x) * grads[4]);
      total_y += to_y, total_x += to_x;
      add(displacement_y + other, -to_y);
      add(displacement_x + other, -to_x);
    }
    add(displacement_y + x, total_y);
    add(displacement_x + x, total_x);
  }
}

// kBlocks vectors of kClasses classes at once: a weight is read once for all classes, and there are enough sums for
// multiply-adds to overlap. Sums are of differences: where a map is even, hundreds of steps leave it so to the last
// bit, while a weighted mean's roundings, alike at every step, would add up.
template <int kClasses, int kBlocks>
RIBFAST_INLINE void walk_blocks(const WalkJob& job, int64_t row, int64_t x) {
  const int64_t at = row * job.stride + x;
  VFloat sums[kClasses][kBlocks], own[kClasses][kBlocks];
  for (int c = 0; c < kClasses; ++c) {
    for (int b = 0; b < kBlocks; ++b) {
      own[c][b] = load_raw<VFloat>(job.current + c * job.plane + at + b * kLanes), sums[c][b] = VFloat{};
    }
  }
  const float* weights = job.weights + row * job.pairs * job.strip + x;
  for (int64_t p = 0; p < job.pairs; ++p, weights += job.strip) {
    const int64_t y = job.y[p], move = job.x[p];
    const float* back = weights - y * job.pairs * job.strip - move;
    const float* current = job.current + at;
    const int64_t distance = y * job.stride + move;
    for (int b = 0; b < kBlocks; ++b) {
      const VFloat forth = load_raw<VFloat>(weights + b * kLanes), from = load_raw<VFloat>(back + b * kLanes);
      for (int c = 0; c < kClasses; ++c) {
        const float* map = current + c * job.plane + b * kLanes;
        sums[c][b] += forth * (load_raw<VFloat>(map + distance) - own[c][b]);
        sums[c][b] += from * (load_raw<VFloat>(map - distance) - own[c][b]);
      }
    }
  }
  for (int b = 0; b < kBlocks; ++b) {
    const VFloat inverse = load_raw<VFloat>(job.inverse + at + b * kLanes);
    for (int c = 0; c < kClasses; ++c) {
      const int64_t place = c * job.plane + at + b * kLanes;
      VFloat value = own[c][b] + sums[c][b] * inverse;
      if (job.twice) value = 2.0f * value - load_raw<VFloat>(job.next + place);
      store_raw(job.next + place, value);
      if (job.result) store_raw(job.result + place, load_raw<VFloat>(job.result + place) + job.factor * value);
    }
  }
}

template <int kClasses>
void walk(const WalkJob& job, int64_t begin, int64_t end) {
  constexpr int kBlocks = kClasses <= 2 ? 4 : 2;
  for (int64_t row = begin; row < end; ++row) {
    int64_t x = 0;
    for (; x + kBlocks * kLanes <= job.width; x += kBlocks * kLanes) walk_blocks<kClasses, kBlocks>(job, row, x);
    for (; x < job.width; x += kLanes) walk_blocks<kClasses, 1>(job, row, x);
  }
}
