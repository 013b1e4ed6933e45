// Counting an image's pixels by true label, best class and thresholds below its map. Included by kernels.inl.
//
// Layout: a row of each plane, `plane` elements apart; counts: kHistogramCopies of them, `copy` apart, so that equal
// neighbours do not wait for one another's increments.
//
// How many thresholds lie below x: `cells` cuts their range evenly and says how many lie below all of a cell, since
// x -> cell only grows, rounded as it is; those within the cell (`steps` at most, one as a rule) are compared.

template <class St>
bool threshold_row(const ThresholdRow& row, const void* maps_, const uint8_t* mask) {
  constexpr int64_t kBlock = 256;
  const auto* maps = static_cast<const typename St::Element*>(maps_);
  const VFloat last = splat(static_cast<float>(row.n_cells - 1));
  VInt32 nan{};
  const auto place = [&](VFloat best, VInt32 winner) {
    nan |= best != best;
    VFloat position = (best - row.low) * row.scale;
    position = position > VFloat{} ? position : VFloat{};
    position = position < last ? position : last;
    VFloat below = gather<4>(row.cells, __builtin_convertvector(position, VInt32));
    for (int32_t step = 0; step < row.steps; ++step) {
      below = gather<4>(row.edges, __builtin_convertvector(below, VInt32)) < best ? below + 1.0f : below;
    }
    return winner + __builtin_convertvector(below, VInt32);
  };
  for (int64_t begin = 0; begin < row.width; begin += kBlock) {
    const int64_t count = row.width - begin < kBlock ? row.width - begin : kBlock;
    int32_t bins[kBlock];
    for (int64_t i = 0; i < count; i += kLanes) {
      const auto load = [&](int64_t plane) {
        const auto* at = maps + plane * row.plane + begin + i;
        if (i + kLanes <= count) return St::load(at);
        VFloat part{};
        for (int64_t lane = 0; lane < count - i; ++lane) part[lane] = St::get(at + lane);
        return part;
      };
      VFloat best = load(0);
      VInt32 winner{};
      for (int64_t plane = 1; plane < row.planes; ++plane) {
        const VFloat x = load(plane);
        nan |= x != x;
        winner = x > best ? VInt32{} + static_cast<int32_t>(plane * row.bins) : winner;
        best = x > best ? x : best;
      }
      store_raw(bins + i, place(best, winner));
    }
    const uint8_t* labels = mask + begin;
    int64_t i = 0;
    for (; i + kHistogramCopies <= count; i += kHistogramCopies) {
      for (int64_t k = 0; k < kHistogramCopies; ++k) {
        ++row.counts[k * row.copy + row.label_rows[labels[i + k]] + bins[i + k]];
      }
    }
    for (; i < count; ++i) ++row.counts[row.label_rows[labels[i]] + bins[i]];
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (nan[lane]) return false;
  }
  return true;
}
