// T^steps as a series of Chebyshev polynomials of T, of fewer terms than steps. Free of torch.
//
// T is similar to a symmetric matrix whose eigenvalues lie in [-1, 1] (D^-1/2 W D^-1/2), and on [-1, 1]
// x^n = sum over k of 2^(1-n) binomial(n, (n-k)/2) T_k(x), k of n's parity (half of it for k = 0): the weights are the
// chances of a plain random walk to end k away, and beyond a few sqrt(n) there is nothing. What is left out changes
// cams T^n, in the norm that D weighs, by less than the sum of the weights left out.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace ribfast {

struct WalkSeries {
  std::vector<double> factors;  // of T_0, T_1, ...; empty: apply T `steps` times
  int64_t applications;         // of T
};

inline WalkSeries walk_series(int64_t steps, double tolerance) {
  const double n = static_cast<double>(steps);
  const auto factor = [&](int64_t k) {
    if ((steps - k) % 2 != 0) return 0.0;
    const double lower = (n - static_cast<double>(k)) / 2, upper = n - lower;
    const double ways = std::lgamma(n + 1) - std::lgamma(lower + 1) - std::lgamma(upper + 1);
    const double chance = std::exp(ways - n * std::log(2.0));
    return k ? 2 * chance : chance;
  };
  double left_out = 0;
  int64_t degree = steps;
  while (degree > 0 && left_out + factor(degree) <= tolerance) left_out += factor(degree--);
  // a term costs a little more than a step, and small powers are best plain
  if (degree * 5 >= steps * 4) return {{}, steps};
  WalkSeries series{{}, degree};
  for (int64_t k = 0; k <= degree; ++k) series.factors.push_back(factor(k));
  return series;
}

// 1e-10 leaves any pixel within 1e-10 sqrt(D pixels) of the largest value that walks, D being the largest sum of a
// column before division, at most 1 + 2 pairs: 1e-6 at a million pixels and radius 5.
constexpr double kWalkTolerance = 1e-10;

}  // namespace ribfast
