// The CPU kernels, one body for every tier: included after the tier's target pragma with
//   RIBFAST_TIER_NAME, RIBFAST_TIER_TABLE, RIBFAST_VECTOR_BYTES.
// Everything but the table is in an unnamed namespace, so that the linker can never serve one tier's code to another
// (no inline function of external linkage may be used here, those of the standard library included). Free of torch.
//
// Layout: maps are contiguous; pointers need no alignment; n >= 1.

namespace ribfast::cpu {
namespace {

#include "simd.h"

template <typename S>
constexpr S kInfinity = static_cast<S>(__builtin_inf());

// One pass over a map: its maximum, NaN if it holds one.

template <class St>
typename St::S map_maximum(const typename St::Element* map, int64_t n) {
  using S = typename St::S;
  using V = typename St::V;
  using Mask = typename Wide<S>::Mask;
  constexpr int L = St::lanes;
  V top[4] = {splat(-kInfinity<S>), splat(-kInfinity<S>), splat(-kInfinity<S>), splat(-kInfinity<S>)};
  Mask nan[2] = {Mask{}, Mask{}};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    for (int k = 0; k < 4; ++k) {
      const V x = St::load(map + i + k * L);
      top[k] = x > top[k] ? x : top[k];
      nan[k & 1] |= x != x;
    }
  }
  for (; i + L <= n; i += L) {
    const V x = St::load(map + i);
    top[0] = x > top[0] ? x : top[0];
    nan[0] |= x != x;
  }
  for (int k = 1; k < 4; ++k) top[0] = top[k] > top[0] ? top[k] : top[0];
  S result = -kInfinity<S>;
  bool has_nan = false;
  for (int k = 0; k < L; ++k) {
    result = top[0][k] > result ? top[0][k] : result;
    has_nan |= (nan[0][k] | nan[1][k]) != 0;
  }
  for (; i < n; ++i) {
    const S x = St::get(map + i);
    result = x > result ? x : result;
    has_nan |= x != x;
  }
  return has_nan ? static_cast<S>(__builtin_nan("")) : result;
}

// GNDRP(T) = sum over U_tau of T(u) / divisor, U_tau = {u : T(u) / max T <= tau}

RIBFAST_INLINE float next_above(float x) {
  const int32_t u = bits<int32_t>(x);
  return x == 0 ? bits<float>(int32_t{1}) : bits<float>(x > 0 ? u + 1 : u - 1);
}

RIBFAST_INLINE double next_above(double x) {
  const int64_t u = bits<int64_t>(x);
  return x == 0 ? bits<double>(int64_t{1}) : bits<double>(x > 0 ? u + 1 : u - 1);
}

// U_tau as the cheapest test that is exactly x / top <= tau. The rounded quotient grows with x for top > 0, so there
// is one number `below` that parts the map, a few roundings from tau * top; elsewhere every element is divided.
template <typename S>
struct Kept {
  enum { kAll, kBelow, kDivide } how;
  S below, top, tau;
  bool strict;

  Kept(bool present, S top_, S tau_, bool strict_) : how(kDivide), below(0), top(top_), tau(tau_), strict(strict_) {
    if (!present || top != top) {
      how = kAll;
    } else if (top == 0) {  // x / 0 is -inf for x < 0 and NaN for x = 0
      how = kBelow;
    } else if (top > 0 && top < kInfinity<S>) {
      S x = tau * top;
      if (!(x > -kInfinity<S> && x < kInfinity<S>)) return;
      for (int steps = 0; steps < 8; ++steps) {
        const bool here = is_kept(x, top, tau, strict), under = is_kept(-next_above(-x), top, tau, strict);
        if (!here && under) {
          how = kBelow, below = x;
          return;
        }
        x = here ? next_above(x) : -next_above(-x);
      }
    }
  }
};

template <class St, int How>
struct KeptTest {
  using S = typename St::S;
  using V = typename St::V;
  using Mask = typename Wide<S>::Mask;
  Kept<S> kept;
  RIBFAST_INLINE Mask operator()(V x) const {
    if constexpr (How == Kept<S>::kAll) return ~Mask{};
    if constexpr (How == Kept<S>::kBelow) return x < splat(kept.below);
    const V level = x / splat(kept.top);
    return kept.strict ? level < splat(kept.tau) : level <= splat(kept.tau);
  }
  RIBFAST_INLINE bool operator()(S x) const {
    if constexpr (How == Kept<S>::kAll) return true;
    if constexpr (How == Kept<S>::kBelow) return x < kept.below;
    return is_kept(x, kept.top, kept.tau, kept.strict);
  }
};

// Sum and count of the kept elements. Partial sums of a few thousand elements are added up in double, so that large
// maps lose nothing.
template <class St, int How>
void kept_sum(const typename St::Element* map, int64_t n, const Kept<typename St::S>& kept, typename St::S* sum,
              int64_t* count) {
  using S = typename St::S;
  using V = typename St::V;
  using Mask = typename Wide<S>::Mask;
  constexpr int L = St::lanes;
  constexpr int64_t kPart = 4096;
  const KeptTest<St, How> test{kept};
  double whole = 0;
  *count = 0;
  for (int64_t begin = 0; begin < n; begin += kPart) {
    const int64_t end = begin + kPart < n ? begin + kPart : n;
    V total[4] = {V{}, V{}, V{}, V{}};
    Mask minus_count[4] = {Mask{}, Mask{}, Mask{}, Mask{}};
    int64_t i = begin;
    for (; i + 4 * L <= end; i += 4 * L) {
      for (int k = 0; k < 4; ++k) {
        const V x = St::load(map + i + k * L);
        const Mask mask = test(x);
        total[k] += bits<V>(mask & bits<Mask>(x));
        minus_count[k] += mask;
      }
    }
    for (; i + L <= end; i += L) {
      const V x = St::load(map + i);
      const Mask mask = test(x);
      total[0] += bits<V>(mask & bits<Mask>(x));
      minus_count[0] += mask;
    }
    S part = sum_lanes<S>((total[0] + total[1]) + (total[2] + total[3]));
    const Mask counts = (minus_count[0] + minus_count[1]) + (minus_count[2] + minus_count[3]);
    for (int lane = 0; lane < L; ++lane) *count -= counts[lane];
    for (; i < end; ++i) {
      const S x = St::get(map + i);
      if (test(x)) part += x, ++*count;
    }
    whole += part;
  }
  *sum = static_cast<S>(whole);
}

template <class St>
void gndrp(const void* map_, int64_t n, bool present, double tau, bool divide_by_all, bool strict, void* pooled,
           void* stats) {
  using S = typename St::S;
  const auto* map = static_cast<const typename St::Element*>(map_);
  const S top = present ? map_maximum<St>(map, n) : S(0);
  const Kept<S> kept(present, top, static_cast<S>(tau), strict);
  S sum;
  int64_t count;
  switch (kept.how) {
    case Kept<S>::kAll: kept_sum<St, Kept<S>::kAll>(map, n, kept, &sum, &count); break;
    case Kept<S>::kBelow: kept_sum<St, Kept<S>::kBelow>(map, n, kept, &sum, &count); break;
    case Kept<S>::kDivide: kept_sum<St, Kept<S>::kDivide>(map, n, kept, &sum, &count); break;
  }
  const S divisor = static_cast<S>(divide_by_all || !present ? n : count > 0 ? count : 1);
  *static_cast<S*>(pooled) = sum / divisor;
  static_cast<S*>(stats)[0] = top;
  static_cast<S*>(stats)[1] = divisor;
}

template <class St, int How>
void kept_fill(const typename St::Element* map, int64_t n, const Kept<typename St::S>& kept,
               typename St::Element value, typename St::Element* result) {
  constexpr int L = St::lanes;
  const KeptTest<St, How> test{kept};
  int64_t i = 0;
  for (; i + L <= n; i += L) St::store_where(result + i, test(St::load(map + i)), value);
  for (; i < n; ++i) result[i] = test(St::get(map + i)) ? value : typename St::Element(0);
}

template <class St>
void gndrp_backward(const void* map_, int64_t n, bool present, double tau, bool strict, const void* stats_,
                    const void* grad, void* result_) {
  using S = typename St::S;
  const auto* map = static_cast<const typename St::Element*>(map_);
  auto* result = static_cast<typename St::Element*>(result_);
  const auto* stats = static_cast<const S*>(stats_);
  const Kept<S> kept(present, stats[0], static_cast<S>(tau), strict);
  const auto value = St::from(*static_cast<const S*>(grad) / stats[1]);
  switch (kept.how) {
    case Kept<S>::kAll: kept_fill<St, Kept<S>::kAll>(map, n, kept, value, result); break;
    case Kept<S>::kBelow: kept_fill<St, Kept<S>::kBelow>(map, n, kept, value, result); break;
    case Kept<S>::kDivide: kept_fill<St, Kept<S>::kDivide>(map, n, kept, value, result); break;
  }
}

// accumulate: out(y, x) = sum over scales of bilinear(A_s)(y, x), A_s = ReLU(T) + mirrored ReLU(T').
//
// A row of A_s is merged and stretched to the output's width once, when the sweep down the output first needs it (h
// stretches instead of H); each output row is then a blend of two held rows a scale, read from the first-level cache,
// and the output is the only memory that is written.

template <class St>
RIBFAST_INLINE typename St::S rectified(const typename St::Element* p, bool relu) {
  const typename St::S x = St::get(p);
  return relu && x < 0 ? 0 : x;  // NaN stays
}

// Loads that cross a cache line cost two: rows start on one.
template <typename S>
RIBFAST_INLINE S* aligned(void* scratch) {
  return reinterpret_cast<S*>((reinterpret_cast<uintptr_t>(scratch) + kCacheLine - 1) / kCacheLine * kCacheLine);
}

// stretch: result(x) = (1 - t) source(cell) + t source(cell + 1) for x < columns. source is readable, with copies of
// its last value, kColumnBlock beyond its width.
RIBFAST_INLINE void stretch(const double* source, const CamScale& scale, int64_t columns, double* result) {
  const auto* t = static_cast<const double*>(scale.column_t);
  for (int64_t x = 0; x < columns; ++x) {
    const double* at = source + scale.column_cell[x];
    result[x] = (1 - t[x]) * at[0] + t[x] * at[1];
  }
}

RIBFAST_INLINE void stretch(const float* source, const CamScale& scale, int64_t columns, float* result) {
  const auto* t = static_cast<const float*>(scale.column_t);
  for (int64_t x = 0; x < columns; x += kLanes) {
    const int32_t* cell = scale.column_cell + x;
    const VFloat weight = load_raw<VFloat>(t + x);
    VFloat left, right;
#if !defined(__clang__)  // which has no shuffle by a vector that varies
    if (cell[kLanes - 1] - cell[0] < kLanes) {  // always so when enlarging: a block's cells lie in one vector
      const VInt32 lane = load_raw<VInt32>(cell) - cell[0];
      left = __builtin_shuffle(load_raw<VFloat>(source + cell[0]), lane);
      right = __builtin_shuffle(load_raw<VFloat>(source + cell[0] + 1), lane);
    } else
#endif
    {
      for (int k = 0; k < kLanes; ++k) left[k] = source[cell[k]], right[k] = source[cell[k] + 1];
    }
    store_raw(result + x, (1 - weight) * left + weight * right);
  }
}

template <class St>
void merged_row(const CamScale& scale, int64_t row, bool relu, typename St::S* source) {
  const auto* view = static_cast<const typename St::Element*>(scale.map) + row * scale.width;
  const int32_t width = scale.width;
  if (scale.view_stride) {
    const auto* mirrored = view + scale.view_stride + width - 1;
    for (int32_t x = 0; x < width; ++x) source[x] = rectified<St>(view + x, relu) + rectified<St>(mirrored - x, relu);
  } else {
    for (int32_t x = 0; x < width; ++x) source[x] = rectified<St>(view + x, relu);
  }
  for (int32_t x = width; x < width + kColumnBlock + 1; ++x) source[x] = source[width - 1];
}

template <typename S, int N>
RIBFAST_INLINE void blend(const S* const* low_, const S* const* high_, const S* t_, int64_t width, bool add, S* out) {
  using V = typename Wide<S>::V;
  constexpr int L = sizeof(V) / sizeof(S);
  const S *low[N], *high[N];  // copies, in registers: the compiler cannot know that `out` is none of the originals
  S lower[N], upper[N];
  for (int s = 0; s < N; ++s) low[s] = low_[s], high[s] = high_[s], lower[s] = t_[s], upper[s] = 1 - t_[s];
  int64_t x = 0;
  for (; x + L <= width; x += L) {
    V sum = add ? load_raw<V>(out + x) : V{};
    for (int s = 0; s < N; ++s) {  // two fused multiply-adds a scale
      sum += upper[s] * load_raw<V>(low[s] + x);
      sum += lower[s] * load_raw<V>(high[s] + x);
    }
    store_raw(out + x, sum);
  }
  for (; x < width; ++x) {
    S sum = add ? out[x] : S(0);
    for (int s = 0; s < N; ++s) {
      sum += upper[s] * low[s][x];
      sum += lower[s] * high[s][x];
    }
    out[x] = sum;
  }
}

template <class St>
void accumulate(const CamJob& job, void* out_, bool add) {
  using S = typename St::S;
  constexpr int kGroup = 4;  // scales blended in one sweep of a row: their pointers fit the registers
  S* rows = aligned<S>(job.scratch);
  S* source = rows + 2 * job.count * job.columns;
  auto* out = static_cast<S*>(out_);
  for (int32_t first = 0; first < job.count; first += kGroup, add = true) {
    const int32_t count = job.count - first < kGroup ? job.count - first : kGroup;
    S *low[kGroup], *high[kGroup], t[kGroup];
    int32_t low_cell[kGroup], high_cell[kGroup];
    for (int32_t s = 0; s < count; ++s) {
      low[s] = rows + 2 * (first + s) * job.columns, high[s] = low[s] + job.columns;
      low_cell[s] = high_cell[s] = -1;
    }
    for (int64_t y = job.row_begin; y < job.row_end; ++y) {
      for (int32_t s = 0; s < count; ++s) {
        const CamScale& scale = job.scales[first + s];
        const int32_t cell = scale.row_cell[y], next = cell + 1 < scale.height ? cell + 1 : cell;
        t[s] = static_cast<const S*>(scale.row_t)[y];
        if (low_cell[s] != cell) {
          if (high_cell[s] == cell) {
            S* held = low[s];
            low[s] = high[s], high[s] = held, high_cell[s] = low_cell[s];
          } else {
            merged_row<St>(scale, cell, job.relu, source);
            stretch(source, scale, job.columns, low[s]);
          }
          low_cell[s] = cell;
        }
        if (high_cell[s] != next) {
          merged_row<St>(scale, next, job.relu, source);
          stretch(source, scale, job.columns, high[s]);
          high_cell[s] = next;
        }
      }
      S* row = out + y * job.width;
      switch (count) {
        case 1: blend<S, 1>(low, high, t, job.width, add, row); break;
        case 2: blend<S, 2>(low, high, t, job.width, add, row); break;
        case 3: blend<S, 3>(low, high, t, job.width, add, row); break;
        default: blend<S, 4>(low, high, t, job.width, add, row); break;
      }
    }
  }
}

// The transpose of stretch and of the merge: a row of output gradients, already summed down, becomes one row of the
// map's gradient, masked by the ReLU.
template <class St>
void shrink_row(const CamJob& job, int64_t row, const typename St::S* grads, typename St::S* cells, void* result_) {
  using S = typename St::S;
  using T = typename St::Element;
  const CamScale& scale = job.scales[0];
  const auto* t = static_cast<const S*>(scale.column_t);
  const int32_t width = scale.width;
  for (int32_t x = 0; x <= width; ++x) cells[x] = 0;
  int32_t cell = 0;
  S here = 0, next = 0;
  for (int64_t x = 0; x < job.width; ++x) {
    for (; cell < scale.column_cell[x]; ++cell) cells[cell] = here, here = next, next = 0;
    here += (1 - t[x]) * grads[x];
    next += t[x] * grads[x];
  }
  cells[cell] = here, cells[cell + 1] = next;
  cells[width - 1] += cells[width];  // the tap beyond the last cell reads the last cell
  const auto* view = static_cast<const T*>(scale.map) + row * width;
  auto* out = static_cast<T*>(result_) + row * width;
  for (int32_t x = 0; x < width; ++x) out[x] = St::from(job.relu && St::get(view + x) <= 0 ? S(0) : cells[x]);
  if (scale.view_stride) {
    const T* mirrored = view + scale.view_stride;
    T* out_mirrored = out + scale.view_stride;
    for (int32_t x = 0; x < width; ++x) {
      out_mirrored[x] = St::from(job.relu && St::get(mirrored + x) <= 0 ? S(0) : cells[width - 1 - x]);
    }
  }
}

template <class St>
void accumulate_backward(const CamJob& job, const void* grads_, void* result) {
  using S = typename St::S;
  using V = typename Wide<S>::V;
  constexpr int L = sizeof(V) / sizeof(S);
  const CamScale& scale = job.scales[0];
  const auto* grads = static_cast<const S*>(grads_);
  const auto* t = static_cast<const S*>(scale.row_t);
  S* low = aligned<S>(job.scratch);
  S* high = low + job.columns;
  S* cells = high + job.columns;
  for (int64_t x = 0; x < 2 * job.columns; ++x) low[x] = 0;
  int32_t cell = 0;
  const auto advance = [&] {
    shrink_row<St>(job, cell++, low, cells, result);
    S* held = low;
    low = high, high = held;
    for (int64_t x = 0; x < job.width; ++x) high[x] = 0;
  };
  for (int64_t y = 0; y < job.row_end; ++y) {
    while (cell < scale.row_cell[y]) advance();
    const S lower = cell + 1 < scale.height ? t[y] : S(0), upper = 1 - lower;
    const S* row = grads + y * job.width;
    int64_t x = 0;
    for (; x + L <= job.width; x += L) {
      const V g = load_raw<V>(row + x);
      store_raw(low + x, load_raw<V>(low + x) + upper * g);
      store_raw(high + x, load_raw<V>(high + x) + lower * g);
    }
    for (; x < job.width; ++x) low[x] += upper * row[x], high[x] += lower * row[x];
  }
  while (cell < scale.height) advance();
}

// normalize: result = map / (max map + eps)

template <class St>
void normalize(const void* map_, int64_t n, double eps, void* result_) {
  using S = typename St::S;
  constexpr int L = St::lanes;
  const auto* map = static_cast<const typename St::Element*>(map_);
  auto* result = static_cast<typename St::Element*>(result_);
  const S divisor = map_maximum<St>(map, n) + static_cast<S>(eps);
  int64_t i = 0;
  for (; i + L <= n; i += L) St::store(result + i, St::load(map + i) / splat(divisor));
  for (; i < n; ++i) result[i] = St::from(St::get(map + i) / divisor);
}

#include "adapt.inl"
#include "lattice.inl"
#include "pairs.inl"
#include "losses.inl"
#include "erase.inl"
#include "refine.inl"
#include "histogram.inl"

}  // namespace

#define RIBFAST_EACH_STORAGE(kernel) \
  { kernel<Stored<kDouble>>, kernel<Stored<kFloat>>, kernel<Stored<kHalf>>, kernel<Stored<kBFloat16>> }
#define RIBFAST_EACH_STORAGE_IN(kernel, S) \
  { kernel<Stored<kDouble>, S>, kernel<Stored<kFloat>, S>, kernel<Stored<kHalf>, S>, kernel<Stored<kBFloat16>, S> }

extern const Kernels RIBFAST_TIER_TABLE = {
    RIBFAST_TIER_NAME,
    kLanes,
    RIBFAST_EACH_STORAGE(gndrp),
    RIBFAST_EACH_STORAGE(gndrp_backward),
    RIBFAST_EACH_STORAGE(accumulate),
    RIBFAST_EACH_STORAGE(accumulate_backward),
    RIBFAST_EACH_STORAGE(normalize),
    RIBFAST_EACH_STORAGE(activate),
    RIBFAST_EACH_STORAGE(activate_backward),
    {nullptr, folded_dot<Stored<kFloat>>, folded_dot<Stored<kHalf>>, folded_dot<Stored<kBFloat16>>},
    {nullptr, folded_move<Stored<kFloat>>, folded_move<Stored<kHalf>>, folded_move<Stored<kBFloat16>>},
    path_affinity,
    path_affinity_backward,
    pair_losses,
    pair_losses_backward,
    {walk<1>, walk<2>, walk<3>, walk<4>},
    {nullptr, read_logits<Stored<kFloat>>, read_logits<Stored<kHalf>>, read_logits<Stored<kBFloat16>>},
    {nullptr, write_logits<Stored<kFloat>>, write_logits<Stored<kHalf>>, write_logits<Stored<kBFloat16>>},
    pixel_losses,
    pixel_loss_sums,
    pixel_losses_backward,
    {RIBFAST_EACH_STORAGE_IN(erase, float), RIBFAST_EACH_STORAGE_IN(erase, double)},
    {RIBFAST_EACH_STORAGE_IN(erase_backward, float), RIBFAST_EACH_STORAGE_IN(erase_backward, double)},
    affinities,
    refine_row,
    {nullptr, threshold_row<Stored<kFloat>>, threshold_row<Stored<kHalf>>, threshold_row<Stored<kBFloat16>>},
    embed,
    find,
    blur,
    blur_one,
    slice_tiles,
    splat_tiles,
    update,
};

#undef RIBFAST_EACH_STORAGE
#undef RIBFAST_EACH_STORAGE_IN
#undef RIBFAST_INLINE

}  // namespace ribfast::cpu
