// What maps attend to taken out of images, and the maps' gradient: vectors over the pixels of a row. Included by
// kernels.inl. Layouts: erase.h.

RIBFAST_INLINE VFloat exp_below(VFloat x) { return exp_of_negative<VFloat, VInt32>(x); }

RIBFAST_INLINE VDouble exp_below(VDouble x) {
  for (unsigned i = 0; i < sizeof x / sizeof x[0]; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

// How an image's pixels lie: a channel's one after another, C channels of a pixel one after another, or in any way.
constexpr int kPlanes = 1, kAnyway = 0;

RIBFAST_INLINE int pixel_layout(const PixelRows& pixels, int64_t channels) {
  if (pixels.column_stride == 1) return kPlanes;
  const bool packed = pixels.channel_stride == 1 && pixels.column_stride == channels && channels <= 4;
  return packed ? static_cast<int>(channels) : kAnyway;
}

template <int kBytes>
struct LaneIndex {
  using type = int32_t;
};
template <>
struct LaneIndex<8> {
  using type = int64_t;
};

// Which lanes C vectors of pixels with C channels, one after another, have of a vector of pixels, and the other way.
template <int C, typename Index, int L>
struct ChannelLanes {
  Index pixel[C][L], pick[C][C][L];  // pick[c][v]: lane of what is picked, or L + lane of vector v

  constexpr ChannelLanes() : pixel(), pick() {
    for (int i = 0; i < C * L; ++i) pixel[i / L][i % L] = i / C;
    for (int c = 0; c < C; ++c) {
      for (int v = 0; v < C; ++v) {
        for (int i = 0; i < L; ++i) pick[c][v][i] = (C * i + c) / L == v ? L + (C * i + c) % L : i;
      }
    }
  }
};
template <int C, typename Index, int L>
constexpr ChannelLanes<C, Index, L> kChannelLanes{};

#if defined(__clang__)
template <typename V, typename Index>
RIBFAST_INLINE V shuffled(V a, V b, const Index* lanes) {
  constexpr int L = sizeof(V) / sizeof(Index);
  V result;
  for (int i = 0; i < L; ++i) result[i] = lanes[i] < L ? a[lanes[i]] : b[lanes[i] - L];
  return result;
}
#else
template <typename V, typename Index>
RIBFAST_INLINE V shuffled(V a, V b, const Index* lanes) {
  return __builtin_shuffle(a, b, load_raw<decltype(a > b)>(lanes));
}
#endif

// Vector v of C that hold each lane C times in a row.
template <int C, typename V>
RIBFAST_INLINE V repeated(V x, int v) {
  using Index = typename LaneIndex<sizeof(x[0])>::type;
  return shuffled(x, x, kChannelLanes<C, Index, sizeof(V) / sizeof(Index)>.pixel[v]);
}

// Channel c of C vectors of pixels whose C channels lie one after another.
template <int C, typename V>
RIBFAST_INLINE V channel_of(const V* pixels, int c) {
  using Index = typename LaneIndex<sizeof(pixels[0][0])>::type;
  V result = pixels[0];
  for (int v = 0; v < C; ++v) {
    result = shuffled(result, pixels[v], kChannelLanes<C, Index, sizeof(V) / sizeof(Index)>.pick[c][v]);
  }
  return result;
}

// Attention at the pixels of a strip: the two rows of cells are stretched to the row's width once.
template <typename S>
struct StripAttention {
  using V = typename Wide<S>::V;
  S *above, *below;

  explicit StripAttention(const EraseStrip& strip) : above(aligned<S>(strip.scratch)), below(above + strip.columns) {
    CamScale scale{};
    scale.column_cell = strip.cell, scale.column_t = strip.column_t;
    stretch(static_cast<const S*>(strip.low), scale, strip.columns, above);
    stretch(static_cast<const S*>(strip.high), scale, strip.columns, below);
  }
  RIBFAST_INLINE V operator()(int64_t x, S t) const {
    const V first = load_raw<V>(above + x);
    return first + t * (load_raw<V>(below + x) - first);
  }
};

// `count` lanes, then 0.
template <typename V>
RIBFAST_INLINE V first_lanes(V x, int64_t count) {
  constexpr int L = sizeof(V) / sizeof(x[0]);
  for (int i = 0; i < L; ++i) x[i] = i < count ? x[i] : 0;
  return x;
}

template <class St, typename S, int kLayout>
double erase_rows(const EraseStrip& strip, const PixelRows& image, const PixelRows& erased) {
  using V = typename Wide<S>::V;
  using T = typename St::Element;
  constexpr int L = sizeof(V) / sizeof(S);
  const StripAttention<S> attention(strip);
  const S sharpness = static_cast<S>(strip.sharpness), level = static_cast<S>(strip.level);
  double area = 0;
  for (int64_t y = 0; y < strip.rows; ++y) {
    const S t = static_cast<const S*>(strip.row_t)[y];
    const T* from = reinterpret_cast<const T*>(image.at) + y * image.row_stride;
    T* to = reinterpret_cast<T*>(erased.at) + y * erased.row_stride;
    V sum{};
    for (int64_t x = 0; x < strip.width; x += L) {
      const V a = attention(x, t), z = sharpness * (a - level);
      const V e = exp_below(z > V{} ? -z : z), kept = (z > V{} ? e : splat(S(1))) / (S(1) + e);
      const int64_t count = strip.width - x;
      sum += count < L ? first_lanes(a, count) : a;
      if constexpr (kSame<S, typename St::S>) {
        if (kLayout == kPlanes && count >= L) {
          for (int64_t c = 0; c < strip.channels; ++c) {
            St::store(to + c * erased.channel_stride + x, kept * St::load(from + c * image.channel_stride + x));
          }
          continue;
        }
        if (kLayout > kPlanes && count >= L) {
          for (int v = 0; v < kLayout; ++v) {
            const int64_t at = x * kLayout + v * L;
            St::store(to + at, repeated<kLayout>(kept, v) * St::load(from + at));
          }
          continue;
        }
      }
      for (int i = 0; i < L && i < count; ++i) {
        for (int64_t c = 0; c < strip.channels; ++c) {
          const T* pixel = from + c * image.channel_stride + (x + i) * image.column_stride;
          const S value = kept[i] * static_cast<S>(St::get(pixel));
          to[c * erased.channel_stride + (x + i) * erased.column_stride] = St::from(static_cast<typename St::S>(value));
        }
      }
    }
    area += sum_lanes<S>(sum);
  }
  return area;
}

// Returns the sum of the attention.
template <class St, typename S>
double erase(const EraseStrip& strip, const PixelRows& image, const PixelRows& erased) {
  if constexpr (kSame<S, typename St::S>) {
    const int layout = pixel_layout(image, strip.channels);
    if (layout == pixel_layout(erased, strip.channels)) {
      switch (layout) {
        case kPlanes: return erase_rows<St, S, kPlanes>(strip, image, erased);
        case 2: return erase_rows<St, S, 2>(strip, image, erased);
        case 3: return erase_rows<St, S, 3>(strip, image, erased);
        case 4: return erase_rows<St, S, 4>(strip, image, erased);
      }
    }
  }
  return erase_rows<St, S, kAnyway>(strip, image, erased);
}

template <class St, typename S, int kLayout>
void erase_rows_backward(const EraseStrip& strip, const PixelRows& image, const PixelRows& grad, S grad_area, S* above,
                         S* below) {
  using V = typename Wide<S>::V;
  using T = typename St::Element;
  constexpr int L = sizeof(V) / sizeof(S);
  const StripAttention<S> attention(strip);
  const S sharpness = static_cast<S>(strip.sharpness), level = static_cast<S>(strip.level);
  for (int64_t y = 0; y < strip.rows; ++y) {
    const S t = static_cast<const S*>(strip.row_t)[y];
    const T* from = reinterpret_cast<const T*>(image.at) + y * image.row_stride;
    const T* grads = reinterpret_cast<const T*>(grad.at) + (grad.at ? y * grad.row_stride : 0);
    for (int64_t x = 0; x < strip.width; x += L) {
      const int64_t count = strip.width - x;
      V dot{};
      if constexpr (kSame<S, typename St::S>) {
        if (kLayout == kPlanes && count >= L) {
          for (int64_t c = 0; c < strip.channels; ++c) {
            dot += St::load(grads + c * grad.channel_stride + x) * St::load(from + c * image.channel_stride + x);
          }
        }
        if constexpr (kLayout > kPlanes) {
          if (count >= L) {
            V products[kLayout];
            for (int v = 0; v < kLayout; ++v) {
              const int64_t at = x * kLayout + v * L;
              products[v] = St::load(grads + at) * St::load(from + at);
            }
            for (int c = 0; c < kLayout; ++c) dot += channel_of<kLayout>(products, c);
          }
        }
      }
      if (grad.at && (kLayout == kAnyway || count < L)) {
        for (int i = 0; i < L && i < count; ++i) {
          for (int64_t c = 0; c < strip.channels; ++c) {
            dot[i] += static_cast<S>(St::get(grads + c * grad.channel_stride + (x + i) * grad.column_stride)) *
                      static_cast<S>(St::get(from + c * image.channel_stride + (x + i) * image.column_stride));
          }
        }
      }
      const V z = sharpness * (attention(x, t) - level);
      const V e = exp_below(z > V{} ? -z : z), slope = sharpness * e / ((S(1) + e) * (S(1) + e));
      V d = grad_area - slope * dot;
      if (count < L) d = first_lanes(d, count);
      const V lower = t * d;
      store_raw(above + x, load_raw<V>(above + x) + (d - lower));
      store_raw(below + x, load_raw<V>(below + x) + lower);
    }
  }
}

// low, high: of `cells` + 1 cells each, set to what the strip adds to its two rows' gradients of the attention.
template <class St, typename S>
void erase_backward(const EraseStrip& strip, const PixelRows& image, const PixelRows& grad, double grad_area,
                    void* low_, void* high_) {
  S* above = aligned<S>(strip.scratch) + 2 * strip.columns;
  S* below = above + strip.columns;
  for (int64_t x = 0; x < 2 * strip.columns; ++x) above[x] = 0;
  const S area = static_cast<S>(grad_area);
  const int layout = grad.at ? pixel_layout(image, strip.channels) : kAnyway;
  if (kSame<S, typename St::S> && layout != kAnyway && layout == pixel_layout(grad, strip.channels)) {
    switch (layout) {
      case 2: erase_rows_backward<St, S, 2>(strip, image, grad, area, above, below); break;
      case 3: erase_rows_backward<St, S, 3>(strip, image, grad, area, above, below); break;
      case 4: erase_rows_backward<St, S, 4>(strip, image, grad, area, above, below); break;
      default: erase_rows_backward<St, S, kPlanes>(strip, image, grad, area, above, below); break;
    }
  } else {
    erase_rows_backward<St, S, kAnyway>(strip, image, grad, area, above, below);
  }
  auto *low = static_cast<S*>(low_), *high = static_cast<S*>(high_);
  for (int64_t cell = 0; cell <= strip.cells; ++cell) low[cell] = high[cell] = 0;
  const auto* t = static_cast<const S*>(strip.column_t);
  for (int64_t x = 0; x < strip.width;) {
    const int32_t cell = strip.cell[x];
    S low_sum = 0, low_right = 0, high_sum = 0, high_right = 0;
    for (; x < strip.width && strip.cell[x] == cell; ++x) {
      low_sum += above[x], low_right += t[x] * above[x];
      high_sum += below[x], high_right += t[x] * below[x];
    }
    low[cell] += low_sum - low_right, low[cell + 1] += low_right;
    high[cell] += high_sum - high_right, high[cell + 1] += high_right;
  }
}
