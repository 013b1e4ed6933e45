// Cross-entropies of pixels over logits that are enlarged on the way, and their gradient: vectors over labels. Included
// by kernels.inl. Layouts: losses.h.

constexpr float kNoLabel = -3e38f;  // in the lanes behind the last label: their exponentials are 0

// exp(x), exp(80) above 80.
RIBFAST_INLINE VFloat exp_of(VFloat x) { return exp_of_negative<VFloat, VInt32>(x > splat(80.0f) ? splat(80.0f) : x); }

// log(1 + x) for x >= 0.
RIBFAST_INLINE VFloat log_of_more(VFloat x) {
  const VFloat whole = 1.0f + x;
  return log_of(whole) + (x - (whole - 1.0f)) / whole;
}

// 1 - exp(-x) for x >= 0.
RIBFAST_INLINE VFloat rest_of_exp(VFloat x) {
  const VFloat series = x * (1.0f - x * (0.5f - x * (0.16666667f - x * (0.04166667f - x * 0.00833333f))));
  return x < 0.1f ? series : 1.0f - exp_of(-x);
}

RIBFAST_INLINE VFloat between(const float* a, const float* b, float t) {
  const VFloat first = load_raw<VFloat>(a);
  return first + t * (load_raw<VFloat>(b) - first);
}

RIBFAST_INLINE float between(float a, float b, float t) { return a + t * (b - a); }

// logits: of one row, those of a label column_stride apart, of a column label_stride apart.
template <class St>
void read_logits(const void* logits_, int64_t label_stride, int64_t column_stride, int32_t n_labels, int64_t columns,
                 int64_t padded, float* row) {
  const auto* logits = static_cast<const typename St::Element*>(logits_);
  for (int64_t x = 0; x < columns; ++x) {
    for (int64_t label = n_labels; label < padded; ++label) row[x * padded + label] = kNoLabel;
  }
  for (int64_t label = 0; label < n_labels; ++label) {
    for (int64_t x = 0; x < columns; ++x) {
      row[x * padded + label] = St::get(logits + label * label_stride + x * column_stride);
    }
  }
  for (int64_t label = 0; label < padded; ++label) row[columns * padded + label] = row[(columns - 1) * padded + label];
}

// result: one row of a map's gradient, labels label_stride apart, from one or two rows of sums (b may be null).
template <class St>
void write_logits(const float* a, const float* b, int32_t n_labels, int64_t columns, int64_t padded,
                  int64_t label_stride, void* result_) {
  auto* result = static_cast<typename St::Element*>(result_);
  for (int64_t label = 0; label < n_labels; ++label) {
    for (int64_t x = 0; x < columns; ++x) {
      const int64_t at = x * padded + label;
      result[label * label_stride + x] = St::from(b ? a[at] + b[at] : a[at]);
    }
  }
}

// The row's logits between its two rows, in its scratch.
RIBFAST_INLINE float* blended_row(const LossRow& row) {
  for (int64_t i = 0; i < (row.columns + 1) * row.padded; i += kLanes) {
    store_raw(row.scratch + i, between(row.low + i, row.high + i, row.t));
  }
  return row.scratch;
}

// Sum over labels of exp(z - top), top the largest z.
__attribute__((noinline)) float sum_below_top(const float* left, const float* right, float t, int64_t padded,
                                              float* top) {
  VFloat largest = splat(-kInfinity<float>);
  for (int64_t v = 0; v < padded; v += kLanes) largest = Larger()(largest, between(left + v, right + v, t));
  *top = over_group<kLanes>(largest, Larger())[0];
  VFloat total{};
  for (int64_t v = 0; v < padded; v += kLanes) total += exp_of(between(left + v, right + v, t) - *top);
  return over_group<kLanes>(total, Sum())[0];
}

// -log softmax(z)[label] = log(1 + sum over others of exp(z - z[label])), which keeps what small losses are made of; 0
// for what is no label. Returns one that is not ignored either, or -1. No largest z is looked for where that sum is far
// from overflow.
int32_t pixel_losses(const LossRow& row, float* losses) {
  constexpr float kLargeSum = 1e34f;  // less than exp(80)
  const float* logits = blended_row(row);
  float *sums = row.scratch + (row.columns + 1) * row.padded, *bases = sums + row.width + kLanes;
  const VInt32 lanes = lane_numbers();
  int32_t wrong = -1;
  for (int64_t x = 0; x < row.width; ++x) {
    const int32_t label = row.labels[x];
    sums[x] = bases[x] = 0;
    if (label >= row.n_labels) {
      wrong = label == kIgnoredLabel ? wrong : label;
      continue;
    }
    const float *left = logits + row.cell[x] * row.padded, *right = left + row.padded, t = row.column_t[x];
    const float own = between(left[label], right[label], t);
    VFloat total{};
    for (int64_t v = 0; v < row.padded; v += kLanes) {
      total += keep(lanes + static_cast<int32_t>(v) != label, exp_of(between(left + v, right + v, t) - own));
    }
    sums[x] = over_group<kLanes>(total, Sum())[0];
    if (!(sums[x] < kLargeSum)) {
      float top;
      sums[x] = sum_below_top(left, right, t, row.padded, &top) - 1;
      bases[x] = top - own;
    }
  }
  for (int64_t x = row.width; x < row.width + kLanes; ++x) sums[x] = bases[x] = 0;
  for (int64_t x = 0; x < row.width; x += kLanes) {
    store_some(losses + x, load_raw<VFloat>(bases + x) + log_of_more(load_raw<VFloat>(sums + x)), row.width - x);
  }
  return wrong;
}

RIBFAST_INLINE VFloat chord(const LossFit& fit) { return exp_of(log_of(splat(kLeastLoss)) * (fit.k - 1)); }

RIBFAST_INLINE VFloat fitted(VFloat loss, const LossFit& fit) {
  const VFloat k = splat(fit.k);
  if (fit.how == kClampLoss) return loss > k ? k : loss;
  if (fit.how == kIgnoreLoss) return loss > k ? VFloat{} : loss;
  if (fit.how == kPowerOfLoss) return loss > splat(kLeastLoss) ? exp_of(log_of(loss) * k) : loss * chord(fit);
  return loss;
}

RIBFAST_INLINE VFloat slope_of_fitted(VFloat loss, const LossFit& fit) {
  const VFloat one = splat(1.0f);
  if (fit.how == kClampLoss || fit.how == kIgnoreLoss) return keep(loss <= splat(fit.k), one);
  if (fit.how == kPowerOfLoss) {
    return loss > splat(kLeastLoss) ? fit.k * exp_of(log_of(loss) * (fit.k - 1)) : chord(fit);
  }
  return one;
}

// sums of fitted losses of pixels of label 0 and of other labels, and how many there are of each: added to.
void pixel_loss_sums(const float* losses, const uint8_t* labels, int64_t n, int32_t n_labels, const LossFit& fit,
                     double* sums) {
  VFloat totals[2] = {};
  VInt32 minus_counts[2] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    VInt32 label;
    for (int lane = 0; lane < kLanes; ++lane) label[lane] = i + lane < n ? labels[i + lane] : kIgnoredLabel;
    const VFloat value = fitted(load_some(losses + i, n - i), fit);
    const VInt32 of_group[2] = {label == 0, (label != 0) & (label < n_labels)};
    for (int group = 0; group < 2; ++group) {
      totals[group] += keep(of_group[group], value);
      minus_counts[group] += of_group[group];
    }
  }
  for (int group = 0; group < 2; ++group) {
    for (int lane = 0; lane < kLanes; ++lane) sums[group] += totals[group][lane];
    for (int lane = 0; lane < kLanes; ++lane) sums[2 + group] -= minus_counts[group][lane];
  }
}

// weights: of the losses of label 0 and of other labels. Adds to the gradients of the two rows of logits. The pixels
// between two columns add up to two vectors of labels, in registers: no scatter.
void pixel_losses_backward(const LossRow& row, const float* losses, const float* weights, const LossFit& fit,
                           float* low, float* high) {
  const float* logits = blended_row(row);
  const int64_t room = row.width + kLanes;
  // slopes and the other labels' probability, then, of the pixels that count, weights and the own label's gradient
  float *each = row.scratch + (row.columns + 1) * row.padded, *own = each + room;
  float *ts = own + room, *at_label = ts + room, *loss_of = at_label + room;  // the log of the sum is that of the two
  auto* labels = reinterpret_cast<int32_t*>(loss_of + room);
  for (int64_t x = 0; x < row.width; x += kLanes) {
    const VFloat loss = load_some(losses + x, row.width - x);
    store_raw(each + x, slope_of_fitted(loss, fit));
    store_raw(own + x, rest_of_exp(loss));
  }
  const VInt32 lanes = lane_numbers();
  for (int64_t x = 0; x < row.width;) {
    const int32_t cell = row.cell[x];
    const float *left = logits + cell * row.padded, *right = left + row.padded;
    int64_t count = 0;
    for (; x < row.width && row.cell[x] == cell; ++x) {
      const int32_t label = row.labels[x];
      if (label >= row.n_labels) continue;
      const float weight = each[x] * weights[label != 0];
      if (weight == 0) continue;
      own[count] = -weight * own[x], each[count] = weight, labels[count] = label, ts[count] = row.column_t[x];
      at_label[count] = between(left[label], right[label], row.column_t[x]), loss_of[count] = losses[x];
      if (losses[x] > kRoughLoss) {
        const float sum = sum_below_top(left, right, row.column_t[x], row.padded, at_label + count);
        loss_of[count] = log_of(splat(sum))[0];
      }
      ++count;
    }
    for (int64_t v = 0; count > 0 && v < row.padded; v += kLanes) {
      const VFloat first = load_raw<VFloat>(left + v), step = load_raw<VFloat>(right + v) - first;
      const VInt32 numbers = lanes + static_cast<int32_t>(v);
      VFloat sum{}, sum_right{};
      for (int64_t i = 0; i < count; ++i) {
        const VFloat grad = each[i] * exp_of((first + ts[i] * step - at_label[i]) - loss_of[i]);
        const VFloat whole = numbers == labels[i] ? splat(own[i]) : grad;
        sum += whole, sum_right += ts[i] * whole;
      }
      const VFloat sum_left = sum - sum_right;
      for (int64_t side = 0; side < 2; ++side) {
        const int64_t at = (cell + side) * row.padded + v;
        const VFloat part = side ? sum_right : sum_left;
        store_raw(low + at, load_raw<VFloat>(low + at) + (1 - row.t) * part);
        store_raw(high + at, load_raw<VFloat>(high + at) + row.t * part);
      }
    }
  }
}
