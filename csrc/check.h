// What operators demand of their tensors, for every device, and the one form in which they refuse:
// "op: expected X, got Y". Python says the same earlier and with more help (ribfast/ops/contract.py); these checks
// keep memory safe when torch.ops.ribfast is called directly.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "math.h"

#define RIBFAST_CHECK_VALUE(cond, op, expected, ...) \
  TORCH_CHECK_VALUE(cond, op, ": expected ", expected, ", got ", __VA_ARGS__)
#define RIBFAST_CHECK_TYPE(cond, op, expected, ...) \
  TORCH_CHECK_TYPE(cond, op, ": expected ", expected, ", got ", __VA_ARGS__)

namespace ribfast {

inline at::ScalarType accumulator_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_float(const char* op, const char* name, const at::Tensor& t) {
  const auto type = t.scalar_type();
  RIBFAST_CHECK_TYPE(type == at::kDouble || type == at::kFloat || type == at::kHalf || type == at::kBFloat16, op,
                     c10::str(name, " in float64, float32, float16 or bfloat16"), c10::toString(type));
}

inline void check_same_device(const char* op, const at::Tensor& a, const at::Tensor& b) {
  RIBFAST_CHECK_VALUE(a.device() == b.device(), op, "all tensors on one device", a.device(), " and ", b.device());
}

inline void check_gndrp(const char* op, const at::Tensor& maps, const at::Tensor& present) {
  check_float(op, "maps", maps);
  RIBFAST_CHECK_VALUE(maps.dim() == 4 && maps.size(2) > 0 && maps.size(3) > 0, op, "maps (N, C, H, W) with H, W >= 1",
                      maps.sizes());
  RIBFAST_CHECK_TYPE(present.scalar_type() == at::kBool, op, "present in bool", c10::toString(present.scalar_type()));
  RIBFAST_CHECK_VALUE(present.dim() == 2 && present.size(0) == maps.size(0) && present.size(1) == maps.size(1), op,
                      "present (N, C) of the maps", present.sizes(), " for maps ", maps.sizes());
  check_same_device(op, maps, present);
}

inline void check_gndrp_backward(const at::Tensor& grad, const at::Tensor& maps, const at::Tensor& present,
                                 const at::Tensor& stats) {
  RIBFAST_CHECK_VALUE(grad.sizes() == present.sizes() && stats.numel() == 2 * present.numel(), "gndrp_backward",
                      "grad (N, C) and stats (N, C, 2)", grad.sizes(), " and ", stats.sizes());
  RIBFAST_CHECK_TYPE(stats.scalar_type() == accumulator_type(maps.scalar_type()), "gndrp_backward",
                     "the stats that gndrp returned", c10::toString(stats.scalar_type()));
  check_same_device("gndrp_backward", maps, grad);
  check_same_device("gndrp_backward", maps, stats);
}

// One image of accumulate_cams: its maps over scales, contiguous, and where they go.
struct CamImage {
  std::vector<at::Tensor> scales;  // (V, C, h, w)
  int64_t channels, height, width, padded_height, padded_width;
};

// maps: all scales of all images in a row, counts[i] of them for image i; sizes and padded: H, W of each image.
inline std::vector<CamImage> check_accumulate_cams(const char* op, at::TensorList maps, at::IntArrayRef counts,
                                                   at::IntArrayRef sizes, at::IntArrayRef padded) {
  RIBFAST_CHECK_VALUE(sizes.size() == 2 * counts.size() && padded.size() == sizes.size(), op,
                      "an (H, W) in sizes and padded for each image", sizes.size(), " and ", padded.size(),
                      " numbers for ", counts.size(), " images");
  std::vector<CamImage> images(counts.size());
  size_t next = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    CamImage& image = images[i];
    image.height = sizes[2 * i], image.width = sizes[2 * i + 1];
    image.padded_height = padded[2 * i], image.padded_width = padded[2 * i + 1];
    RIBFAST_CHECK_VALUE(image.height > 0 && image.width > 0 && image.padded_height >= image.height &&
                            image.padded_width >= image.width && image.padded_height < (1 << 24) &&
                            image.padded_width < (1 << 24),
                        op, "1 <= size <= padded < 2^24", "size (", image.height, ", ", image.width, ") and padded (",
                        image.padded_height, ", ", image.padded_width, ")");
    RIBFAST_CHECK_VALUE(counts[i] > 0 && counts[i] <= static_cast<int64_t>(maps.size() - next), op,
                        "counts that add up to the number of maps", "counts ", counts, " for ", maps.size(), " maps");
    for (int64_t s = 0; s < counts[i]; ++s, ++next) {
      const at::Tensor& map = maps[next];
      check_float(op, "maps", map);
      check_same_device(op, map, maps[0]);
      RIBFAST_CHECK_TYPE(map.scalar_type() == maps[0].scalar_type(), op, "maps of one dtype",
                         c10::toString(map.scalar_type()), " and ", c10::toString(maps[0].scalar_type()));
      RIBFAST_CHECK_VALUE(map.dim() == 4 && (map.size(0) == 1 || map.size(0) == 2) && map.size(2) > 0 &&
                              map.size(3) > 0 && map.size(2) < (1 << 24) && map.size(3) < (1 << 24),
                          op, "maps (V, C, h, w) with V 1 or 2 and h, w >= 1", map.sizes());
      image.channels = s == 0 ? map.size(1) : image.channels;
      RIBFAST_CHECK_VALUE(map.size(1) == image.channels, op, "the same classes at every scale", map.size(1), " and ",
                          image.channels);
      image.scales.push_back(map.contiguous());
    }
  }
  RIBFAST_CHECK_VALUE(next == maps.size(), op, "counts that add up to the number of maps", "counts ", counts, " for ",
                      maps.size(), " maps");
  return images;
}

// H, W of each (C, H, W) tensor in a row: the `sizes` of check_accumulate_cams.
inline std::vector<int64_t> sizes_of(at::TensorList targets) {
  std::vector<int64_t> sizes;
  for (const at::Tensor& target : targets) {
    RIBFAST_CHECK_VALUE(target.dim() == 3, "accumulate_cams", "targets (C, H, W)", target.sizes());
    sizes.insert(sizes.end(), {target.size(1), target.size(2)});
  }
  return sizes;
}

// Uninitialised results of accumulate_cams.
inline std::vector<at::Tensor> empty_cams(const std::vector<CamImage>& images) {
  std::vector<at::Tensor> out;
  for (const CamImage& image : images) {
    const at::Tensor& map = image.scales[0];
    out.push_back(at::empty({image.channels, image.height, image.width},
                            map.options().dtype(accumulator_type(map.scalar_type()))));
  }
  return out;
}

// The (C, H, W) targets of `images`: what accumulate_cams adds into, and what its backward reads.
inline void check_cam_targets(const char* op, at::TensorList targets, const std::vector<CamImage>& images) {
  RIBFAST_CHECK_VALUE(targets.size() == images.size(), op, "one (C, H, W) tensor for each image", targets.size(),
                      " for ", images.size(), " images");
  for (size_t i = 0; i < images.size(); ++i) {
    const at::Tensor &target = targets[i], &map = images[i].scales[0];
    const std::vector<int64_t> shape{images[i].channels, images[i].height, images[i].width};
    RIBFAST_CHECK_VALUE(target.sizes() == at::IntArrayRef(shape), op, c10::str("a tensor of shape ", shape),
                        target.sizes());
    RIBFAST_CHECK_TYPE(target.scalar_type() == accumulator_type(map.scalar_type()), op,
                       c10::str(c10::toString(accumulator_type(map.scalar_type())), " for such maps"),
                       c10::toString(target.scalar_type()));
    check_same_device(op, target, map);
  }
}

// Targets are written from several threads at once: each must have memory that no other target and no map shares.
inline void check_apart(const char* op, at::TensorList targets, at::TensorList maps) {
  using Range = std::pair<uintptr_t, uintptr_t>;
  const auto range = [](const at::Tensor& t) -> Range {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    return {begin, begin + (last + 1) * t.element_size()};
  };
  std::vector<Range> taken;
  for (const at::Tensor& target : targets) {
    if (target.numel() > 0) taken.push_back(range(target));
  }
  std::sort(taken.begin(), taken.end());
  for (size_t i = 1; i < taken.size(); ++i) {
    RIBFAST_CHECK_VALUE(taken[i - 1].second <= taken[i].first, op, "every out in memory of its own",
                        "two that share some; clone() one");
  }
  for (const at::Tensor& map : maps) {
    if (map.numel() == 0) continue;
    const Range own = range(map);
    const auto after = std::lower_bound(taken.begin(), taken.end(), Range{own.second, 0});
    RIBFAST_CHECK_VALUE(after == taken.begin() || (after - 1)->second <= own.first, op,
                        "out in memory of its own", "one that shares some with a map; clone() it");
  }
}

inline void check_same_type(const char* op, const char* name, const at::Tensor& t, const at::Tensor& like) {
  RIBFAST_CHECK_TYPE(t.scalar_type() == like.scalar_type(), op,
                     c10::str(name, " in ", c10::toString(like.scalar_type())), c10::toString(t.scalar_type()));
  check_same_device(op, t, like);
}

// (N, C, H, W) whose channels lie one after another.
inline void check_channels_last(const char* op, const char* name, const at::Tensor& t) {
  RIBFAST_CHECK_VALUE(t.layout() == at::kStrided && t.dim() == 4 && t.is_contiguous(at::MemoryFormat::ChannelsLast),
                      op, c10::str(name, " (N, C, H, W), channels last"), t.sizes());
}

inline void check_like(const char* op, const char* name, const at::Tensor& t, const at::Tensor& like) {
  check_channels_last(op, name, t);
  RIBFAST_CHECK_VALUE(t.sizes() == like.sizes(), op, c10::str(name, " of shape ", like.sizes()), t.sizes());
  check_same_type(op, name, t, like);
}

inline void check_activation(const char* op, const at::Tensor& y, double limit) {
  check_float(op, "y", y);
  check_channels_last(op, "y", y);
  RIBFAST_CHECK_VALUE(limit > 0, op, "a limit above 0", limit);
}

// What activate_ adds to y, and its mask.
inline void check_activate_(const at::Tensor& y, const std::optional<at::Tensor>& shortcut,
                            const std::optional<at::Tensor>& mask, double limit) {
  const char* op = "activate_";
  check_activation(op, y, limit);
  if (shortcut) check_like(op, "shortcut", *shortcut, y);
  if (mask) {
    RIBFAST_CHECK_VALUE(mask->layout() == at::kStrided && mask->dim() == 4 && mask->size(0) == y.size(0) &&
                            mask->size(1) == 1 && mask->size(2) == y.size(2) && mask->size(3) == y.size(3) &&
                            mask->is_contiguous(),
                        op, "a contiguous mask (N, 1, H, W) of y", mask->sizes(), " for ", y.sizes());
    check_same_type(op, "mask", *mask, y);
  }
}

inline void check_activate_backward(const at::Tensor& grad, const at::Tensor& y, double limit) {
  check_activation("activate_backward", y, limit);
  check_like("activate_backward", "grad", grad, y);
}

inline void check_update_folded_(const at::Tensor& grad, const at::Tensor& bias_grad,
                                 const std::optional<at::Tensor>& anchor, const std::optional<at::Tensor>& bias_anchor,
                                 const at::Tensor& weight, const at::Tensor& affine, const at::Tensor& norm,
                                 const at::Tensor& new_weight, const at::Tensor& new_affine, const at::Tensor& velocity,
                                 const at::Tensor& affine_velocity, const at::Tensor& folded,
                                 const at::Tensor& folded_bias, const at::Tensor& rate) {
  const char* op = "update_folded_";
  check_float(op, "grad", grad);
  RIBFAST_CHECK_TYPE(grad.scalar_type() != at::kDouble, op, "grad in float32, float16 or bfloat16", "Double");
  check_channels_last(op, "grad", grad);
  check_channels_last(op, "weight", weight);
  RIBFAST_CHECK_VALUE(grad.sizes() == weight.sizes(), op, c10::str("grad of the weight's shape ", weight.sizes()),
                      grad.sizes());
  RIBFAST_CHECK_TYPE(weight.scalar_type() == at::kFloat, op, "weight in float32", c10::toString(weight.scalar_type()));
  check_same_device(op, grad, weight);
  for (const at::Tensor* t : {&new_weight, &velocity}) check_like(op, "float32 states", *t, weight);
  check_like(op, "folded", folded, grad);
  if (anchor) check_like(op, "anchor", *anchor, grad);
  const int64_t rows = weight.size(0);
  for (const at::Tensor* t : {&affine, &norm, &new_affine, &affine_velocity}) {
    RIBFAST_CHECK_VALUE(t->dim() == 2 && t->size(0) == 2 && t->size(1) == rows && t->is_contiguous() &&
                            t->scalar_type() == at::kFloat,
                        op, "contiguous float32 (2, O) tensors", c10::toString(t->scalar_type()), " ", t->sizes());
    check_same_device(op, *t, grad);
  }
  for (const at::Tensor* t : {&bias_grad, bias_anchor ? &*bias_anchor : &bias_grad, &folded_bias}) {
    RIBFAST_CHECK_VALUE(t->dim() == 1 && t->size(0) == rows && t->is_contiguous(), op, "contiguous biases (O,)",
                        t->sizes());
    check_same_type(op, "biases", *t, grad);
  }
  RIBFAST_CHECK_VALUE(rate.layout() == at::kStrided && rate.dim() == 0, op, "rate of shape ()", rate.sizes());
  RIBFAST_CHECK_TYPE(rate.scalar_type() == at::kFloat, op, "rate in float32", c10::toString(rate.scalar_type()));
  check_same_device(op, rate, grad);
}

inline void check_normalize_cams(const char* op, const at::Tensor& cams) {
  check_float(op, "cams", cams);
  RIBFAST_CHECK_VALUE(cams.dim() >= 2 && cams.size(-1) > 0 && cams.size(-2) > 0, op, "cams (..., H, W) with H, W >= 1",
                      cams.sizes());
}

// images: float or uint8, one (N, 3, H, W) for each (N, C, H, W) of maps
inline void check_refine(at::TensorList images, at::TensorList maps, at::IntArrayRef dilations, int64_t iterations,
                         double w1, double w2) {
  const char* op = "refine";
  RIBFAST_CHECK_VALUE(images.size() == maps.size(), op, "images for each of the maps", images.size(), " and ",
                      maps.size());
  for (size_t i = 0; i < maps.size(); ++i) {
    const at::Tensor &image = images[i], &map = maps[i];
    if (image.scalar_type() != at::kByte) check_float(op, "images, unless in uint8,", image);
    check_float(op, "maps", map);
    RIBFAST_CHECK_VALUE(map.dim() == 4 && map.size(2) > 0 && map.size(3) > 0 && map.size(2) < (1 << 24) &&
                            map.size(3) < (1 << 24),
                        op, "maps (N, C, H, W) with H, W from 1 to 2^24", map.sizes());
    RIBFAST_CHECK_VALUE(image.dim() == 4 && image.size(0) == map.size(0) && image.size(1) == 3 &&
                            image.size(2) == map.size(2) && image.size(3) == map.size(3),
                        op, c10::str("images (N, 3, H, W) for maps ", map.sizes()), image.sizes());
    check_same_device(op, image, maps[0]);
    check_same_device(op, map, maps[0]);
  }
  RIBFAST_CHECK_VALUE(!dilations.empty() && dilations.size() <= 16, op, "1 to 16 dilations", dilations.size());
  for (const int64_t d : dilations) RIBFAST_CHECK_VALUE(d >= 1 && d < (1 << 24), op, "dilations from 1 to 2^24", d);
  RIBFAST_CHECK_VALUE(iterations >= 0 && iterations < (int64_t{1} << 31), op, "iterations of at least 0", iterations);
  RIBFAST_CHECK_VALUE(std::isfinite(static_cast<float>(w1)) && static_cast<float>(w1) > 0, op, "a finite w1 above 0",
                      w1);
  RIBFAST_CHECK_VALUE(std::isfinite(static_cast<float>(w2)), op, "a finite w2", w2);
}

// A pairwise term of a CRF: empty, or `size` numbers, the last its strength.
inline void check_crf_term(const char* op, const char* name, at::ArrayRef<double> term, size_t size) {
  RIBFAST_CHECK_VALUE(term.empty() || term.size() == size, op, c10::str(name, " with ", size, " numbers"), term.size());
  for (size_t i = 0; i < term.size(); ++i) {
    RIBFAST_CHECK_VALUE(std::isfinite(static_cast<float>(term[i])) && (i + 1 == size || static_cast<float>(term[i]) > 0), op,
                        c10::str(name, " with finite numbers and standard deviations above 0"), term);
  }
}

inline void check_crf_image(const char* op, const at::Tensor& image) {
  RIBFAST_CHECK_TYPE(image.scalar_type() == at::kByte, op, "images in uint8", c10::toString(image.scalar_type()));
  RIBFAST_CHECK_VALUE(image.dim() == 3 && image.size(2) == 3 && image.numel() > 0 && image.numel() / 3 < (1 << 30), op,
                      "images (H, W, 3) of 1 to 2^30 pixels", image.sizes());
}

inline void check_crf_options(const char* op, at::ArrayRef<double> gaussian, at::ArrayRef<double> bilateral,
                              int64_t iterations, int64_t normalization, int64_t capacity) {
  check_crf_term(op, "gaussian", gaussian, 2);
  check_crf_term(op, "bilateral", bilateral, 3);
  RIBFAST_CHECK_VALUE(iterations >= 0 && iterations < (int64_t{1} << 31), op, "iterations of at least 0", iterations);
  RIBFAST_CHECK_VALUE(normalization >= 0 && normalization <= 3, op, "a normalization from 0 to 3", normalization);
  RIBFAST_CHECK_VALUE(capacity >= 0, op, "a capacity of at least 0", capacity);
}

// How many problems the unary of an image holds.
inline int64_t problems_of(const at::Tensor& unary) { return unary.dim() == 4 ? unary.size(0) : 1; }

// One image of dense_crf and its unary.
inline void check_crf_unary(const char* op, const at::Tensor& image, const at::Tensor& unary) {
  check_crf_image(op, image);
  RIBFAST_CHECK_VALUE((unary.dim() == 3 || unary.dim() == 4) && unary.size(-3) > 0 &&
                          unary.size(-3) < (1 << 24) / std::max<int64_t>(1, problems_of(unary)) &&
                          unary.size(-2) == image.size(0) && unary.size(-1) == image.size(1),
                      op, "unary (L, H, W) or (K, L, H, W) of the image, L >= 1", unary.sizes(), " for an image ",
                      image.sizes());
  check_float(op, "unary", unary);
  check_same_device(op, image, unary);
}

inline void check_crf_confidence(const char* op, int64_t n_labels, double confidence) {
  RIBFAST_CHECK_VALUE(n_labels >= 1 && n_labels <= 256, op, "n_labels from 1 to 256", n_labels);
  RIBFAST_CHECK_VALUE(confidence > 0 && confidence < 1, op, "a confidence above 0 and below 1", confidence);
}

// One image of dense_crf_labels and its label maps.
inline void check_crf_labels(const char* op, const at::Tensor& image, const at::Tensor& labels) {
  check_crf_image(op, image);
  RIBFAST_CHECK_TYPE(labels.scalar_type() == at::kByte, op, "labels in uint8", c10::toString(labels.scalar_type()));
  RIBFAST_CHECK_VALUE(labels.dim() == 3 && labels.size(1) == image.size(0) && labels.size(2) == image.size(1), op,
                      "labels (K, H, W) of the image", labels.sizes(), " for an image ", image.sizes());
  check_same_device(op, image, labels);
}

inline void check_label_map(const char* op, const char* name, const at::Tensor& t) {
  RIBFAST_CHECK_TYPE(t.scalar_type() == at::kByte, op, c10::str(name, " in uint8"), c10::toString(t.scalar_type()));
  RIBFAST_CHECK_VALUE(t.dim() == 2 && t.numel() < (int64_t{1} << 31), op,
                      c10::str(name, " (H, W) of fewer than 2^31 pixels"), t.sizes());
}

inline void check_threshold_histogram(const at::Tensor& maps, const at::Tensor& mask, const at::Tensor& thresholds,
                                      int64_t n_labels, int64_t stride) {
  const char* op = "threshold_histogram";
  check_float(op, "maps", maps);
  check_label_map(op, "mask", mask);
  check_same_device(op, maps, mask);
  check_same_device(op, maps, thresholds);
  RIBFAST_CHECK_VALUE(n_labels >= 1 && n_labels <= 255, op, "n_labels from 1 to 255", n_labels);
  RIBFAST_CHECK_VALUE(stride >= 1 && stride <= 64, op, "a stride from 1 to 64", stride);
  const auto cells = [&](int64_t side) { return (side + stride - 1) / stride; };
  RIBFAST_CHECK_VALUE(maps.dim() == 3 && maps.size(0) <= 255 && maps.size(1) == cells(mask.size(0)) &&
                          maps.size(2) == cells(mask.size(1)) && mask.size(0) < (1 << 24) && mask.size(1) < (1 << 24),
                      op, c10::str("maps (n, H, W) of the mask's size over the stride of ", stride), maps.sizes(),
                      " for a mask ", mask.sizes());
  RIBFAST_CHECK_VALUE((n_labels + 2) * maps.size(0) * (thresholds.numel() + 1) < (1 << 24), op,
                      "fewer than 2^24 counts of labels, classes and thresholds", thresholds.numel(), " thresholds");
  RIBFAST_CHECK_TYPE(thresholds.scalar_type() == at::kFloat, op, "thresholds in float32",
                     c10::toString(thresholds.scalar_type()));
  RIBFAST_CHECK_VALUE(thresholds.dim() == 1 && thresholds.numel() >= 1 && thresholds.numel() <= 10000, op,
                      "a list of 1 to 10000 thresholds", thresholds.sizes());
  const at::Tensor dense = thresholds.contiguous();
  const float* t = dense.const_data_ptr<float>();
  for (int64_t i = 0; i < dense.numel(); ++i) {
    RIBFAST_CHECK_VALUE(std::isfinite(t[i]) && (i == 0 || t[i - 1] <= t[i]), op, "finite thresholds that ascend",
                        t[i], " at ", i);
  }
}

inline void check_confusion_matrix(const at::Tensor& labels, const at::Tensor& mask, int64_t n_labels) {
  const char* op = "confusion_matrix";
  check_label_map(op, "labels", labels);
  check_label_map(op, "mask", mask);
  check_same_device(op, labels, mask);
  RIBFAST_CHECK_VALUE(labels.sizes() == mask.sizes(), op, c10::str("labels of the mask's shape ", mask.sizes()),
                      labels.sizes());
  RIBFAST_CHECK_VALUE(n_labels >= 1 && n_labels <= 255, op, "n_labels from 1 to 255", n_labels);
}

// lattices: how many tensors, `each` of them a lattice
inline void check_mean_field(const char* op, size_t lattices, size_t each, at::ArrayRef<double> strengths,
                             at::IntArrayRef normalizations, int64_t iterations) {
  RIBFAST_CHECK_VALUE(lattices == strengths.size() * each && normalizations.size() == strengths.size(), op,
                      "a strength and a normalization for each lattice", lattices / each, " lattices, ",
                      strengths.size(), " strengths, ", normalizations.size(), " normalizations");
  RIBFAST_CHECK_VALUE(iterations >= 0 && iterations < (int64_t{1} << 31), op, "iterations of at least 0", iterations);
  for (size_t i = 0; i < strengths.size(); ++i) {
    RIBFAST_CHECK_VALUE(std::isfinite(static_cast<float>(strengths[i])), op, "finite strengths", strengths);
    RIBFAST_CHECK_VALUE(normalizations[i] >= 0 && normalizations[i] <= 3, op, "normalizations from 0 to 3",
                        normalizations);
  }
}

inline void check_radius(const char* op, int64_t radius) {
  RIBFAST_CHECK_VALUE(radius >= 2 && radius <= kLargestRadius, op, "a radius from 2 to 16", radius);
}

inline void check_path_affinity(const char* op, const at::Tensor& boundary, int64_t radius, double beta) {
  check_float(op, "boundary", boundary);
  RIBFAST_CHECK_VALUE(boundary.dim() == 3 && boundary.size(1) > 0 && boundary.size(2) > 0 &&
                          boundary.size(1) < (1 << 24) && boundary.size(2) < (1 << 24),
                      op, "boundary (N, h, w) with 1 <= h, w < 2^24", boundary.sizes());
  check_radius(op, radius);
  RIBFAST_CHECK_VALUE(beta > 0 && std::isfinite(static_cast<float>(beta)), op, "a finite beta above 0", beta);
}

inline void check_pair_gradient(const at::Tensor& grad, const at::Tensor& boundary, int64_t radius) {
  const char* op = "path_affinity_backward";
  check_float(op, "grad", grad);
  RIBFAST_CHECK_VALUE(grad.dim() == 4 && grad.size(0) == boundary.size(0) &&
                          grad.size(1) == count_pairs(static_cast<int32_t>(radius)) &&
                          grad.size(2) == boundary.size(1) && grad.size(3) == boundary.size(2),
                      op, "grad (N, P, h, w) of the boundary's pairs", grad.sizes());
  check_same_device(op, grad, boundary);
}

inline void check_pair_losses(const char* op, const at::Tensor& boundary, const at::Tensor& displacement,
                              const at::Tensor& labels, int64_t radius) {
  check_path_affinity(op, boundary, radius, 1);
  check_float(op, "displacement", displacement);
  RIBFAST_CHECK_TYPE(labels.scalar_type() == at::kByte, op, "labels in uint8", c10::toString(labels.scalar_type()));
  RIBFAST_CHECK_VALUE(labels.sizes() == boundary.sizes() && displacement.dim() == 4 &&
                          displacement.size(0) == boundary.size(0) && displacement.size(1) == 2 &&
                          displacement.size(2) == boundary.size(1) && displacement.size(3) == boundary.size(2),
                      op, "displacement (N, 2, h, w) and labels (N, h, w) of the boundary", displacement.sizes(),
                      " and ", labels.sizes(), " for ", boundary.sizes());
  check_same_device(op, boundary, displacement);
  check_same_device(op, boundary, labels);
}

inline void check_loss_gradient(const at::Tensor& grad, const at::Tensor& boundary) {
  check_float("pair_losses_backward", "grad", grad);
  RIBFAST_CHECK_VALUE(grad.dim() == 1 && grad.size(0) == 8, "pair_losses_backward", "grad (8,)", grad.sizes());
  check_same_device("pair_losses_backward", grad, boundary);
}

inline void check_pixel_losses(const char* op, const at::Tensor& logits, const at::Tensor& labels) {
  check_float(op, "logits", logits);
  RIBFAST_CHECK_VALUE(logits.dim() == 4 && logits.size(1) >= 1 && logits.size(1) <= 255 && logits.size(2) > 0 &&
                          logits.size(3) > 0 && logits.size(2) < (1 << 24) && logits.size(3) < (1 << 24),
                      op, "logits (N, L, h, w) with 1 <= L <= 255 and 1 <= h, w < 2^24", logits.sizes());
  RIBFAST_CHECK_TYPE(labels.scalar_type() == at::kByte, op, "labels in uint8", c10::toString(labels.scalar_type()));
  RIBFAST_CHECK_VALUE(labels.dim() == 3 && labels.size(0) == logits.size(0) && labels.size(1) > 0 &&
                          labels.size(2) > 0 && labels.size(1) < (1 << 24) && labels.size(2) < (1 << 24),
                      op, "labels (N, H, W) of the logits' images with 1 <= H, W < 2^24", labels.sizes(), " for ",
                      logits.sizes());
  check_same_device(op, logits, labels);
}

inline void check_pixel_loss_sums(const char* op, const at::Tensor& logits, const at::Tensor& labels,
                                  const at::Tensor& losses, const std::optional<at::Tensor>& active, int64_t fit,
                                  double k) {
  check_pixel_losses(op, logits, labels);
  RIBFAST_CHECK_TYPE(losses.scalar_type() == at::kFloat, op, "losses in float32", c10::toString(losses.scalar_type()));
  RIBFAST_CHECK_VALUE(losses.sizes() == labels.sizes(), op, c10::str("losses of the labels' shape ", labels.sizes()),
                      losses.sizes());
  check_same_device(op, logits, losses);
  RIBFAST_CHECK_VALUE(fit >= kFitAll && fit <= kPowerOfLoss, op, "a fit from 0 to 3", fit);
  RIBFAST_CHECK_VALUE(k > 0 && std::isfinite(static_cast<float>(k)) && (fit != kPowerOfLoss || k <= 1), op,
                      "a finite k above 0, at most 1 as a power", k);
  if (fit == kFitAll) return;
  RIBFAST_CHECK_VALUE(active && active->dim() == 0, op, "active of shape () with a fit", "none or another shape");
  RIBFAST_CHECK_TYPE(active->scalar_type() == at::kBool, op, "active in bool", c10::toString(active->scalar_type()));
  check_same_device(op, logits, *active);
}

inline void check_pixel_loss_gradient(const at::Tensor& grad, const at::Tensor& logits) {
  const char* op = "pixel_loss_sums_backward";
  RIBFAST_CHECK_TYPE(grad.scalar_type() == at::kDouble, op, "grad in float64", c10::toString(grad.scalar_type()));
  RIBFAST_CHECK_VALUE(grad.dim() == 1 && grad.size(0) == 4, op, "grad (4,)", grad.sizes());
  check_same_device(op, grad, logits);
}

inline void check_erase(const char* op, const at::Tensor& images, const at::Tensor& maps, const at::Tensor& which,
                        double sharpness, double level) {
  check_float(op, "images", images);
  check_float(op, "maps", maps);
  RIBFAST_CHECK_VALUE(images.dim() == 4 && images.size(1) > 0 && images.size(1) < (int64_t{1} << 31) &&
                          images.size(2) > 0 && images.size(3) > 0 && images.size(2) < (1 << 24) &&
                          images.size(3) < (1 << 24),
                      op, "images (N, C, H, W) with 1 <= C < 2^31 and 1 <= H, W < 2^24", images.sizes());
  RIBFAST_CHECK_VALUE(maps.dim() == 3 && maps.size(1) > 0 && maps.size(2) > 0 && maps.size(1) < (1 << 24) &&
                          maps.size(2) < (1 << 24),
                      op, "maps (P, h, w) with 1 <= h, w < 2^24", maps.sizes());
  RIBFAST_CHECK_TYPE(which.scalar_type() == at::kLong, op, "which in int64", c10::toString(which.scalar_type()));
  RIBFAST_CHECK_VALUE(which.dim() == 1 && which.size(0) == maps.size(0), op, "which (P,), the image of each map",
                      which.sizes(), " for ", maps.sizes());
  RIBFAST_CHECK_VALUE(std::isfinite(static_cast<float>(sharpness)) && std::isfinite(static_cast<float>(level)), op,
                      "a sharpness and a level that are finite in float32", sharpness, " and ", level);
  check_same_device(op, images, maps);
  check_same_device(op, images, which);
}

inline void check_erase_gradient(const std::optional<at::Tensor>& grad, const std::optional<at::Tensor>& grad_areas,
                                 const at::Tensor& images, const at::Tensor& maps) {
  const char* op = "erase_backward";
  if (grad) {
    check_float(op, "grad", *grad);
    RIBFAST_CHECK_VALUE(grad->dim() == 4 && grad->size(0) == maps.size(0) &&
                            grad->sizes().slice(1) == images.sizes().slice(1),
                        op, "grad (P, C, H, W) of the maps and images", grad->sizes());
    check_same_device(op, *grad, images);
  }
  if (grad_areas) {
    check_float(op, "grad_areas", *grad_areas);
    RIBFAST_CHECK_VALUE(grad_areas->dim() == 1 && grad_areas->size(0) == maps.size(0), op, "grad_areas (P,) of the maps",
                        grad_areas->sizes());
    check_same_device(op, *grad_areas, images);
  }
}

// Pixels that are read as they are: contiguous, or channels last.
inline bool is_interleaved(const at::Tensor& t) {
  return !t.is_contiguous() && t.is_contiguous(at::MemoryFormat::ChannelsLast);
}

inline at::Tensor dense_pixels(const at::Tensor& t) { return is_interleaved(t) ? t : t.contiguous(); }

// Uninitialised, for `count` images of the layout of `images`.
inline at::Tensor empty_images(const at::Tensor& images, int64_t count) {
  const auto layout = is_interleaved(images) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  return at::empty({count, images.size(1), images.size(2), images.size(3)}, images.options(), layout);
}

// One image of random_walk and the weights of its pairs.
inline void check_random_walk(const char* op, const at::Tensor& cams, const at::Tensor& weights, int64_t radius,
                              int64_t steps) {
  check_float(op, "cams", cams);
  check_float(op, "weights", weights);
  check_radius(op, radius);
  RIBFAST_CHECK_VALUE(cams.dim() == 3 && cams.size(1) > 0 && cams.size(2) > 0 && cams.size(1) < (1 << 24) &&
                          cams.size(2) < (1 << 24),
                      op, "cams (C, h, w) with 1 <= h, w < 2^24", cams.sizes());
  RIBFAST_CHECK_VALUE(weights.dim() == 3 && weights.size(0) == count_pairs(static_cast<int32_t>(radius)) &&
                          weights.size(1) == cams.size(1) && weights.size(2) == cams.size(2),
                      op, "weights (P, h, w) of the radius and the cams", weights.sizes());
  RIBFAST_CHECK_VALUE(steps >= 1 && steps <= (1 << 16), op, "steps from 1 to 65536", steps);
  check_same_device(op, cams, weights);
}

}  // namespace ribfast
