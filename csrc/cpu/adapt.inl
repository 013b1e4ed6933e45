// What stands between the convolutions of a network that is adapted to an image: activations, and the update of
// weights with their batch normalisation folded in. Included by kernels.inl.
//
// Layout: y, shortcut, gradients (cells, channels), rows one after another; mask: one element a cell, 0 for the gutter.

// y = min(max(y + shortcut, 0), limit), and 0 in the gutter; NaN stays.
template <class St>
void activate(void* y_, const void* shortcut_, const void* mask_, int64_t cells, int64_t channels, double limit_) {
  using S = typename St::S;
  using V = typename St::V;
  using Mask = typename Wide<S>::Mask;
  using Element = typename St::Element;
  constexpr int L = St::lanes;
  auto* y = static_cast<Element*>(y_);
  const auto* shortcut = static_cast<const Element*>(shortcut_);
  const auto* mask = static_cast<const Element*>(mask_);
  const S limit = static_cast<S>(limit_);
  for (int64_t cell = 0; cell < cells; ++cell, y += channels, shortcut += shortcut ? channels : 0) {
    if (mask && St::get(mask + cell) == 0) {
      __builtin_memset(y, 0, channels * sizeof(Element));
      continue;
    }
    int64_t c = 0;
    for (; c + L <= channels; c += L) {
      V x = St::load(y + c);
      if (shortcut) x += St::load(shortcut + c);
      x = bits<V>(~(x < V{}) & bits<Mask>(x));
      St::store(y + c, x > splat(limit) ? splat(limit) : x);
    }
    for (; c < channels; ++c) {
      S x = St::get(y + c) + (shortcut ? St::get(shortcut + c) : S(0));
      x = x < 0 ? S(0) : x;
      y[c] = St::from(x > limit ? limit : x);
    }
  }
}

// result = grad where 0 < y < limit, else 0; sums[c] += the result's channel c.
template <class St>
void activate_backward(const void* grad_, const void* y_, int64_t cells, int64_t channels, double limit_,
                       void* result_, void* sums_) {
  using S = typename St::S;
  using V = typename St::V;
  using Mask = typename Wide<S>::Mask;
  using Element = typename St::Element;
  constexpr int L = St::lanes;
  const auto* grad = static_cast<const Element*>(grad_);
  const auto* y = static_cast<const Element*>(y_);
  auto* result = static_cast<Element*>(result_);
  auto* sums = static_cast<S*>(sums_);
  const S limit = static_cast<S>(limit_);
  for (int64_t cell = 0; cell < cells; ++cell, grad += channels, y += channels, result += channels) {
    int64_t c = 0;
    for (; c + L <= channels; c += L) {
      const V x = St::load(y + c);
      const V g = bits<V>((x > V{}) & (x < splat(limit)) & bits<Mask>(St::load(grad + c)));
      St::store(result + c, g);
      store_raw(sums + c, load_raw<V>(sums + c) + g);
    }
    for (; c < channels; ++c) {
      const S x = St::get(y + c), g = x > 0 && x < limit ? St::get(grad + c) : S(0);
      result[c] = St::from(g);
      sums[c] += g;
    }
  }
}

// Sum over a row of (grad + anchor) * weight: what the gradient of the folded scale is made of.
template <class St>
float folded_dot(const FoldedRow& row) {
  constexpr int L = St::lanes;
  const auto* grad = static_cast<const typename St::Element*>(row.grad);
  const auto* anchor = static_cast<const typename St::Element*>(row.anchor);
  VFloat total[2] = {VFloat{}, VFloat{}};
  int64_t i = 0;
  for (; i + L <= row.n; i += L) {
    VFloat g = St::load(grad + i);
    if (anchor) g += St::load(anchor + i);
    total[(i / L) & 1] += g * load_raw<VFloat>(row.weight + i);
  }
  float sum = sum_lanes<float>(total[0] + total[1]);
  for (; i < row.n; ++i) sum += (St::get(grad + i) + (anchor ? St::get(anchor + i) : 0.0f)) * row.weight[i];
  return sum;
}

// velocity = momentum * velocity + (grad + anchor) * scale + decay * weight (without the first term at the first step),
// result = weight - rate * velocity, folded = result * folded_scale.
template <class St>
void folded_move(const FoldedRow& row) {
  constexpr int L = St::lanes;
  const auto* grad = static_cast<const typename St::Element*>(row.grad);
  const auto* anchor = static_cast<const typename St::Element*>(row.anchor);
  auto* folded = static_cast<typename St::Element*>(row.folded);
  int64_t i = 0;
  for (; i + L <= row.n; i += L) {
    VFloat g = St::load(grad + i);
    if (anchor) g += St::load(anchor + i);
    const VFloat w = load_raw<VFloat>(row.weight + i);
    VFloat v = g * row.scale + w * row.decay;
    if (!row.first) v += load_raw<VFloat>(row.velocity + i) * row.momentum;
    store_raw(row.velocity + i, v);
    const VFloat moved = w - v * row.rate;
    store_raw(row.result + i, moved);
    St::store(folded + i, moved * row.folded_scale);
  }
  for (; i < row.n; ++i) {
    const float g = St::get(grad + i) + (anchor ? St::get(anchor + i) : 0.0f), w = row.weight[i];
    const float v = g * row.scale + w * row.decay + (row.first ? 0.0f : row.velocity[i] * row.momentum);
    row.velocity[i] = v;
    row.result[i] = w - v * row.rate;
    folded[i] = St::from(row.result[i] * row.folded_scale);
  }
}
