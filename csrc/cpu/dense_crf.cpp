// dense_crf on the CPU: mean field over permutohedral lattices (Kraehenbuehl & Koltun 2011). Threads over images, and
// within an image where there are fewer images than threads.
//
// An iteration is one pass over the points, which slices the blurred values of every lattice, updates the energies,
// takes the softmax and splats the result (so a point's corners and weights are read once), and the blurs. In fast mode
// one label is left out where that saves a vector: probabilities sum to 1.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <mutex>
#include <tuple>

#include "../backend.h"
#include "../check.h"
#include "permutohedral.h"
#include "storage.h"

namespace ribfast::cpu {
namespace {

enum Normalization { kSymmetric, kAfter, kBefore, kNone };

// One pairwise term of one image.
struct Term {
  std::shared_ptr<const Permutohedral> lattice;
  float strength;
  Buffer<float> factor, ones;  // of the normalisation, and after * filter(before)
  Buffer<float> first, second;
  float* values = nullptr;  // in one of the two

  LatticeView view(Normalization how) const {
    LatticeView v{};
    v.corners = lattice->corners.data(), v.weights = lattice->weights.data(), v.dims = lattice->dims;
    v.strength = strength, v.ones = ones.data();
    v.before = how == kSymmetric || how == kBefore ? factor.data() : nullptr;
    v.after = how == kSymmetric || how == kAfter ? factor.data() : nullptr;
    v.values = values;
    return v;
  }

  float* other() { return values == first.data() ? second.data() : first.data(); }

  // Blurs what was splat to `other()`; `values` then holds the result.
  void blur(const Kernels& kernels, int32_t channels) {
    float *in = other(), *out = values == nullptr ? second.data() : values;
    for (int32_t axis = 0; axis <= lattice->dims; ++axis) {
      const int32_t* pairs = lattice->neighbours.data() + int64_t{axis} * lattice->vertices * 2;
      std::memset(out, 0, sizeof(float) * channels);
      at::parallel_for(1, lattice->vertices, 1 + 65536 / channels, [&](int64_t begin, int64_t end) {
        kernels.blur(in, pairs, begin, end, channels, out);
      });
      std::swap(in, out);
    }
    values = in;
  }

  void clear_other(int32_t channels) {
    std::memset(other(), 0, sizeof(float) * channels * int64_t{lattice->vertices});
  }

  // result = filter(input), one channel; input null: ones.
  void filter_one(const Kernels& kernels, const float* input, float* result) {
    first.get(lattice->vertices), second.get(lattice->vertices);
    values = nullptr;
    clear_other(1);
    const int64_t tiles = tiles_of(lattice->points);
    LatticeView v = view(kNone);
    v.splat = other();
    kernels.splat(v, 0, tiles, input);
    blur(kernels, 1);
    v.values = values;
    kernels.slice(v, 0, tiles, result);
    values = nullptr;
  }

  void normalize(const Kernels& kernels, Normalization how, bool need_ones) {
    const int64_t points = tiles_of(lattice->points) * kTile;
    if (how != kNone) {
      float* f = factor.get(points);
      filter_one(kernels, nullptr, f);
      for (int64_t p = 0; p < points; ++p) f[p] = how == kSymmetric ? 1 / std::sqrt(f[p] + 1e-20f) : 1 / (f[p] + 1e-20f);
    }
    if (!need_ones) return;
    float* total = ones.get(points);
    const LatticeView v = view(how);
    filter_one(kernels, v.before, total);
    if (v.after != nullptr) {
      for (int64_t p = 0; p < points; ++p) total[p] *= v.after[p];
    }
  }
};

// Features of the pixels of an image, [dim][pixel].
std::shared_ptr<const Permutohedral> spatial_lattice(int64_t height, int64_t width, double sigma, const Kernels& kernels) {
  const int64_t points = height * width;
  std::vector<float> features(2 * points);
  for (int64_t p = 0; p < points; ++p) {
    features[p] = static_cast<float>(p % width) / static_cast<float>(sigma);
    features[points + p] = static_cast<float>(p / width) / static_cast<float>(sigma);
  }
  return std::make_shared<const Permutohedral>(features.data(), points, 2, kernels);
}

// The lattices of the last sizes: a data set has few, and this one depends on nothing else.
std::shared_ptr<const Permutohedral> cached_spatial_lattice(int64_t height, int64_t width, double sigma,
                                                            const Kernels& kernels) {
  constexpr size_t kKept = 8;
  using Key = std::tuple<int64_t, int64_t, double, const Kernels*>;
  static std::mutex mutex;
  static std::vector<std::pair<Key, std::shared_ptr<const Permutohedral>>> kept;
  const Key key{height, width, sigma, &kernels};
  {
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto it = kept.begin(); it != kept.end(); ++it) {
      if (it->first == key) {
        std::rotate(kept.begin(), it, it + 1);
        return kept.front().second;
      }
    }
  }
  auto lattice = spatial_lattice(height, width, sigma, kernels);
  const std::lock_guard<std::mutex> lock(mutex);
  kept.insert(kept.begin(), {key, lattice});
  if (kept.size() > kKept) kept.pop_back();
  return lattice;
}

std::shared_ptr<const Permutohedral> bilateral_lattice(const at::Tensor& image, double sxy, double srgb,
                                                       const Kernels& kernels) {
  const int64_t width = image.size(1), points = image.size(0) * width;
  const uint8_t* pixels = image.const_data_ptr<uint8_t>();
  std::vector<float> features(5 * points);
  for (int64_t p = 0; p < points; ++p) {
    features[p] = static_cast<float>(p % width) / static_cast<float>(sxy);
    features[points + p] = static_cast<float>(p / width) / static_cast<float>(sxy);
    for (int64_t c = 0; c < 3; ++c) {
      features[(2 + c) * points + p] = static_cast<float>(pixels[3 * p + c]) / static_cast<float>(srgb);
    }
  }
  return std::make_shared<const Permutohedral>(features.data(), points, 5, kernels);
}

// Probabilities (labels, points) of unary (labels, points) under `terms`.
void mean_field(const float* unary, int64_t labels, int64_t points, std::vector<Term>& terms, int64_t iterations,
                Normalization how, bool exact, const Kernels& kernels, float* result) {
  const bool reduced = !exact && labels > 1 && (labels == 2 || labels % 4 == 1);
  const int64_t used = labels - reduced;
  const auto channels = static_cast<int32_t>(reduced && used == 1 ? 1 : (used + 3) / 4 * 4);
  const int64_t tiles = tiles_of(points);
  const int64_t threads = std::min<int64_t>(at::in_parallel_region() ? 1 : at::get_num_threads(), 1 + tiles / 256);
  for (Term& term : terms) {
    term.normalize(kernels, how, reduced);
    term.first.get(int64_t{term.lattice->vertices} * channels);
    term.second.get(int64_t{term.lattice->vertices} * channels);
    term.values = nullptr;
  }
  Buffer<float> negative, probabilities;
  float* energies = negative.get(tiles * kTile * channels);
  for (int64_t p = 0; p < points; ++p) {
    const float last = reduced ? unary[used * points + p] : 0.0f;
    for (int64_t c = 0; c < used; ++c) energies[p * channels + c] = last - unary[c * points + p];
    for (int64_t c = used; c < channels; ++c) energies[p * channels + c] = -INFINITY;
  }
  std::fill(energies + points * channels, energies + tiles * kTile * channels, 0.0f);
  probabilities.get(tiles * kTile * channels);
  // beside the first thread's, each thread splats into memory of its own; added up in the threads' order
  std::vector<std::vector<Buffer<float>>> others(threads - 1);
  for (auto& own : others) own.resize(terms.size());
  for (int64_t iteration = 0; iteration <= iterations; ++iteration) {
    const bool last = iteration == iterations;
    for (Term& term : terms) {
      if (!last) term.clear_other(channels);
    }
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(kTile * channels);
      for (int64_t thread = begin; thread < end; ++thread) {
        std::vector<LatticeView> views;
        for (size_t i = 0; i < terms.size(); ++i) {
          views.push_back(terms[i].view(how));
          if (last) continue;
          views.back().splat = terms[i].other();
          if (thread > 0) {
            const int64_t size = int64_t{terms[i].lattice->vertices} * channels;
            views.back().splat = others[thread - 1][i].get(size);
            std::memset(views.back().splat, 0, sizeof(float) * size);
          }
        }
        kernels.update({views.data(), static_cast<int32_t>(views.size()), tiles * thread / threads,
                        tiles * (thread + 1) / threads, energies, channels, reduced, exact,
                        last ? probabilities.data() : nullptr},
                       scratch.data());
      }
    });
    if (last) break;
    for (size_t i = 0; i < terms.size(); ++i) {
      float* splat = terms[i].other();
      at::parallel_for(0, int64_t{terms[i].lattice->vertices} * channels, 65536, [&](int64_t begin, int64_t end) {
        for (auto& own : others) {
          for (int64_t k = begin; k < end; ++k) splat[k] += own[i].data()[k];
        }
      });
      terms[i].blur(kernels, channels);
    }
  }
  for (int64_t p = 0; p < points; ++p) {
    float rest = 1;
    for (int64_t c = 0; c < used; ++c) {
      result[c * points + p] = probabilities.data()[p * channels + c];
      rest -= result[c * points + p];
    }
    if (reduced) result[used * points + p] = std::max(rest, 0.0f);
  }
}

void check_term(const char* name, at::ArrayRef<double> term, size_t size) {
  RIBFAST_CHECK_VALUE(term.empty() || term.size() == size, "dense_crf", c10::str(name, " with ", size, " numbers"),
                      term.size());
  for (size_t i = 0; i < term.size(); ++i) {
    RIBFAST_CHECK_VALUE(std::isfinite(term[i]) && (i + 1 == size || term[i] > 0), "dense_crf",
                        c10::str(name, " with finite numbers and standard deviations above 0"), term);
  }
}

std::vector<at::Tensor> dense_crf(at::TensorList images, at::TensorList unary, at::ArrayRef<double> gaussian,
                                  at::ArrayRef<double> bilateral, int64_t iterations, int64_t normalization,
                                  bool exact) {
  RIBFAST_CHECK_VALUE(images.size() == unary.size(), "dense_crf", "an image for each unary", images.size(), " and ",
                      unary.size());
  check_term("gaussian", gaussian, 2);
  check_term("bilateral", bilateral, 3);
  RIBFAST_CHECK_VALUE(iterations >= 0, "dense_crf", "iterations of at least 0", iterations);
  RIBFAST_CHECK_VALUE(normalization >= kSymmetric && normalization <= kNone, "dense_crf", "a normalization from 0 to 3",
                      normalization);
  std::vector<at::Tensor> results, dense_images, dense_unary;
  for (size_t i = 0; i < images.size(); ++i) {
    RIBFAST_CHECK_TYPE(images[i].scalar_type() == at::kByte, "dense_crf", "images in uint8",
                       c10::toString(images[i].scalar_type()));
    RIBFAST_CHECK_VALUE(images[i].dim() == 3 && images[i].size(2) == 3, "dense_crf", "images (H, W, 3)", images[i].sizes());
    RIBFAST_CHECK_VALUE(unary[i].dim() == 3 && unary[i].size(0) > 0 && unary[i].size(1) == images[i].size(0) &&
                            unary[i].size(2) == images[i].size(1) && images[i].numel() > 0,
                        "dense_crf", "unary (L, H, W) of the image, L >= 1", unary[i].sizes(), " for an image ",
                        images[i].sizes());
    check_float("dense_crf", "unary", unary[i]);
    check_same_device("dense_crf", images[i], unary[i]);
    dense_images.push_back(images[i].contiguous());
    dense_unary.push_back(unary[i].to(at::kFloat).contiguous());
    results.push_back(at::empty(unary[i].sizes(), dense_unary[i].options()));
  }
  const Kernels& chosen = exact ? tier_default : kernels();
  const auto how = static_cast<Normalization>(normalization);
  const auto one = [&](int64_t i) {
    const int64_t height = dense_images[i].size(0), width = dense_images[i].size(1);
    std::vector<Term> terms;
    if (!gaussian.empty()) {
      terms.emplace_back();
      terms.back().lattice = cached_spatial_lattice(height, width, gaussian[0], chosen);
      terms.back().strength = static_cast<float>(gaussian[1]);
    }
    if (!bilateral.empty()) {
      terms.emplace_back();
      terms.back().lattice = bilateral_lattice(dense_images[i], bilateral[0], bilateral[1], chosen);
      terms.back().strength = static_cast<float>(bilateral[2]);
    }
    mean_field(dense_unary[i].const_data_ptr<float>(), unary[i].size(0), height * width, terms, iterations, how, exact,
               chosen, results[i].mutable_data_ptr<float>());
  };
  const auto count = static_cast<int64_t>(images.size());
  try {
    if (count < at::get_num_threads()) {
      for (int64_t i = 0; i < count; ++i) one(i);
    } else {
      at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) one(i);
      });
    }
  } catch (const std::range_error& error) {
    RIBFAST_CHECK_VALUE(false, "dense_crf", error.what(), "gaussian ", gaussian, ", bilateral ", bilateral);
  } catch (const std::length_error& error) {
    RIBFAST_CHECK_VALUE(false, "dense_crf", error.what(), "an image of too many pixels");
  }
  return results;
}

}  // namespace
}  // namespace ribfast::cpu

TORCH_LIBRARY_IMPL(ribfast, CPU, m) { m.impl("dense_crf", &ribfast::cpu::dense_crf); }
