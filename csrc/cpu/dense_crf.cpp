// The dense CRFs of images on the CPU. Threads over images, and within an image where there are fewer images than
// threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <memory>
#include <mutex>
#include <tuple>

#include "../check.h"
#include "mean_field.h"

namespace ribfast::cpu {
namespace {

struct Image {
  const uint8_t* pixels;  // (height, width, 3)
  int64_t height, width;
};

// A lattice of an image's pixels with the factor of its normalisation.
struct ImageTerm {
  Permutohedral lattice;
  Buffer<float> memory;
  const float* factor;

  ImageTerm(Permutohedral&& built, Normalization how, const Kernels& kernels)
      : lattice(std::move(built)), factor(normalize(lattice.arrays(), how, kernels, memory)) {}
};

// The order of the points: columns of tiles, each from the top to the bottom, so that a point's neighbours above and
// below, which share most of its vertices, are a tile away; then what is left at the right. Empty: the pixels' order.
std::vector<int32_t> point_order(const Image& image, bool exact) {
  std::vector<int32_t> order;
  if (exact || image.width < kTile) return order;
  order.reserve(image.height * image.width);
  for (int64_t left = 0; left < image.width; left += kTile) {
    for (int64_t y = 0; y < image.height; ++y) {
      for (int64_t x = left; x < std::min(left + kTile, image.width); ++x) {
        order.push_back(static_cast<int32_t>(y * image.width + x));
      }
    }
  }
  return order;
}

// The features x / sxy and y / sxy of points, by true division, as pydensecrf has them.
class Places {
 public:
  Places(const Image& image, const std::vector<int32_t>& order, float sxy) : order_(order), width_(image.width) {
    for (int64_t i = 0; i < std::max(image.width, image.height); ++i) scaled_.push_back(static_cast<float>(i) / sxy);
  }

  std::vector<Permutohedral::Range> ranges(const Image& image) const {
    return {{0, scaled_[image.width - 1]}, {0, scaled_[image.height - 1]}};
  }

  void fill(int64_t begin, int64_t end, float* out, int64_t stride) const {
    int64_t before = -2, x = 0, y = 0;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t pixel = order_.empty() ? p : order_[p];
      if (pixel != before + 1 || ++x == width_) y = pixel / width_, x = pixel - y * width_;
      before = pixel;
      out[p - begin] = scaled_[x], out[stride + p - begin] = scaled_[y];
    }
  }

 private:
  const std::vector<int32_t>& order_;
  int64_t width_;
  std::vector<float> scaled_;
};

std::shared_ptr<const ImageTerm> spatial_term(const Image& image, const std::vector<int32_t>& order, double sigma,
                                              bool one_channel, Normalization how, const Kernels& kernels) {
  const Places places(image, order, static_cast<float>(sigma));
  Permutohedral lattice(
      image.height * image.width, places.ranges(image), one_channel, true, kernels,
      [&](int64_t begin, int64_t end, float* out, int64_t stride) { places.fill(begin, end, out, stride); });
  return std::make_shared<const ImageTerm>(std::move(lattice), how, kernels);
}

// The terms of the last sizes: a data set has few, and these depend on nothing else. Large ones are not kept.
std::shared_ptr<const ImageTerm> cached_spatial_term(const Image& image, const std::vector<int32_t>& order,
                                                     double sigma, bool one_channel, Normalization how,
                                                     const Kernels& kernels) {
  constexpr size_t kKept = 8;
  constexpr int64_t kMostPixels = int64_t{1} << 21;  // about 30 bytes each
  using Key = std::tuple<int64_t, int64_t, double, bool, Normalization, const Kernels*, bool>;
  static std::mutex mutex;
  static std::vector<std::pair<Key, std::shared_ptr<const ImageTerm>>> kept;
  const Key key{image.height, image.width, sigma, one_channel, how, &kernels, order.empty()};
  const auto find = [&]() -> std::shared_ptr<const ImageTerm> {
    for (auto it = kept.begin(); it != kept.end(); ++it) {
      if (it->first != key) continue;
      std::rotate(kept.begin(), it, it + 1);
      return kept.front().second;
    }
    return nullptr;
  };
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (auto term = find()) return term;
  }
  auto term = spatial_term(image, order, sigma, one_channel, how, kernels);
  if (image.height * image.width > kMostPixels) return term;
  const std::lock_guard<std::mutex> lock(mutex);
  if (auto other = find()) return other;  // another thread's of this very batch
  kept.insert(kept.begin(), {key, term});
  if (kept.size() > kKept) kept.pop_back();
  return term;
}

std::shared_ptr<const ImageTerm> bilateral_term(const Image& image, const std::vector<int32_t>& order, double sigma_xy,
                                                double sigma_rgb, bool one_channel, Normalization how,
                                                const Kernels& kernels) {
  const Places places(image, order, static_cast<float>(sigma_xy));
  const auto srgb = static_cast<float>(sigma_rgb);
  float colour[256];
  for (int value = 0; value < 256; ++value) colour[value] = static_cast<float>(value) / srgb;
  auto ranges = places.ranges(image);
  ranges.insert(ranges.end(), 3, {0, colour[255]});
  Permutohedral lattice(image.height * image.width, ranges, one_channel, true, kernels,
                        [&](int64_t begin, int64_t end, float* out, int64_t stride) {
                          places.fill(begin, end, out, stride);
                          for (int64_t p = begin; p < end; ++p) {
                            const uint8_t* rgb = image.pixels + 3 * (order.empty() ? p : int64_t{order[p]});
                            for (int c = 0; c < 3; ++c) out[(2 + c) * stride + p - begin] = colour[rgb[c]];
                          }
                        });
  return std::make_shared<const ImageTerm>(std::move(lattice), how, kernels);
}

// What the two operators share.
struct Options {
  const char* op;
  at::ArrayRef<double> gaussian, bilateral;
  int64_t iterations;
  Normalization how;
  bool exact;
};

Options check_options(const char* op, at::ArrayRef<double> gaussian, at::ArrayRef<double> bilateral, int64_t iterations,
                      int64_t normalization, bool exact, int64_t capacity) {
  check_crf_options(op, gaussian, bilateral, iterations, normalization, capacity);
  return {op, gaussian, bilateral, iterations, static_cast<Normalization>(normalization), exact};
}

// Runs `crfs[i]`, but for its terms, on images[i].
void run_all(const Options& options, at::TensorList images, std::vector<MeanField>& crfs) {
  const Kernels& chosen = kernels_for(options.exact);
  const auto one = [&](int64_t i) {
    if (crfs[i].labellings == 0) return;
    const Image image{images[i].const_data_ptr<uint8_t>(), images[i].size(0), images[i].size(1)};
    const std::vector<int32_t> order = point_order(image, options.exact);
    std::vector<std::shared_ptr<const ImageTerm>> terms;
    MeanField& crf = crfs[i];
    crf.exact = options.exact;
    const bool one_channel = crf.has_one_channel();
    const auto add = [&](std::shared_ptr<const ImageTerm> term, double strength) {
      crf.terms.push_back({term->lattice.arrays(), static_cast<float>(strength), options.how, term->factor});
      terms.push_back(std::move(term));
    };
    if (!options.gaussian.empty()) {
      add(cached_spatial_term(image, order, options.gaussian[0], one_channel, options.how, chosen),
          options.gaussian[1]);
    }
    if (!options.bilateral.empty()) {
      add(bilateral_term(image, order, options.bilateral[0], options.bilateral[1], one_channel, options.how, chosen),
          options.bilateral[2]);
    }
    crf.points = image.height * image.width, crf.order = order.empty() ? nullptr : order.data();
    crf.iterations = options.iterations;
    crf.run(chosen);
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
    RIBFAST_CHECK_VALUE(false, options.op, error.what(), "gaussian ", options.gaussian, ", bilateral ",
                        options.bilateral);
  } catch (const std::length_error& error) {
    RIBFAST_CHECK_VALUE(false, options.op, error.what(), "an image of too many pixels");
  }
}

std::vector<at::Tensor> dense_crf(at::TensorList images, at::TensorList unary, at::ArrayRef<double> gaussian,
                                  at::ArrayRef<double> bilateral, int64_t iterations, int64_t normalization, bool exact,
                                  int64_t capacity) {
  const char* op = "dense_crf";
  RIBFAST_CHECK_VALUE(images.size() == unary.size(), op, "an image for each unary", images.size(), " and ",
                      unary.size());
  const Options options = check_options(op, gaussian, bilateral, iterations, normalization, exact, capacity);
  std::vector<at::Tensor> results, dense_images, dense_unary;
  std::vector<MeanField> crfs(images.size());
  for (size_t i = 0; i < images.size(); ++i) {
    check_crf_unary(op, images[i], unary[i]);
    dense_images.push_back(images[i].contiguous());
    dense_unary.push_back(unary[i].to(at::kFloat).contiguous());
    results.push_back(at::empty(unary[i].sizes(), dense_unary[i].options()));
    crfs[i].labels = unary[i].size(-3), crfs[i].labellings = problems_of(unary[i]);
    crfs[i].unary = dense_unary[i].const_data_ptr<float>();
    crfs[i].probabilities = results[i].mutable_data_ptr<float>();
  }
  run_all(options, dense_images, crfs);
  return results;
}

std::vector<at::Tensor> dense_crf_labels(at::TensorList images, at::TensorList labels, int64_t n_labels,
                                         double confidence, int64_t unsure, at::ArrayRef<double> gaussian,
                                         at::ArrayRef<double> bilateral, int64_t iterations, int64_t normalization,
                                         bool exact, int64_t capacity) {
  const char* op = "dense_crf_labels";
  RIBFAST_CHECK_VALUE(images.size() == labels.size(), op, "an image for each label map", images.size(), " and ",
                      labels.size());
  const Options options = check_options(op, gaussian, bilateral, iterations, normalization, exact, capacity);
  check_crf_confidence(op, n_labels, confidence);
  std::vector<at::Tensor> results, dense_images, dense_labels;
  std::vector<MeanField> crfs(images.size());
  for (size_t i = 0; i < images.size(); ++i) {
    check_crf_labels(op, images[i], labels[i]);
    dense_images.push_back(images[i].contiguous());
    dense_labels.push_back(labels[i].contiguous());
    const uint8_t* given = dense_labels[i].const_data_ptr<uint8_t>();
    for (int64_t p = 0; p < dense_labels[i].numel(); ++p) {
      RIBFAST_CHECK_VALUE(given[p] < n_labels || given[p] == unsure, op,
                          c10::str("labels below n_labels (", n_labels, ") or `unsure` (", unsure, ")"),
                          static_cast<int>(given[p]));
    }
    results.push_back(at::empty(labels[i].sizes(), dense_labels[i].options()));
    crfs[i].labels = n_labels, crfs[i].labellings = labels[i].size(0), crfs[i].given = given;
    crfs[i].confidence = confidence, crfs[i].unsure = static_cast<int32_t>(unsure);
    crfs[i].best = results[i].mutable_data_ptr<uint8_t>();
  }
  run_all(options, dense_images, crfs);
  return results;
}

}  // namespace
}  // namespace ribfast::cpu

TORCH_LIBRARY_IMPL(ribfast, CPU, m) {
  m.impl("dense_crf", &ribfast::cpu::dense_crf);
  m.impl("dense_crf_labels", &ribfast::cpu::dense_crf_labels);
}
