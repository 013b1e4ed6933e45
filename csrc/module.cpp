// Every operator's schema, and the pybind11 module for what is not a tensor.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <mutex>
#include <set>
#include <thread>

#include "cpu/kernels.h"

TORCH_LIBRARY(ribfast, m) {
  // (N, C, H, W), (N, C) bool -> pooled (N, C); stats (N, C, 2) = maximum, divisor: what the backward needs
  m.def("gndrp(Tensor maps, Tensor present, float tau, bool divide_by_all, bool strict) -> (Tensor pooled, Tensor stats)");
  m.def("gndrp_backward(Tensor grad, Tensor maps, Tensor present, Tensor stats, float tau, bool strict) -> Tensor");

  // maps: every scale of every image, each (V, C, h, w); counts: scales of each image; sizes, padded: H, W of each
  m.def("accumulate_cams(Tensor[] maps, int[] counts, SymInt[] sizes, SymInt[] padded, bool relu) -> Tensor[]");
  m.def("accumulate_cams_(Tensor(a!)[] out, Tensor[] maps, int[] counts, SymInt[] padded, bool relu) -> ()");
  m.def("accumulate_cams_backward(Tensor[] grads, Tensor[] maps, int[] counts, SymInt[] padded, bool relu) -> Tensor[]");

  // the adapted network's, channels last: y (N, C, H, W) in place, mask (N, 1, H, W); grad, y -> grad's, its sums (C,)
  m.def("activate_(Tensor(a!) y, Tensor? shortcut, Tensor? mask, float limit) -> ()");
  m.def("activate_backward(Tensor grad, Tensor y, float limit) -> (Tensor, Tensor)");
  // a step of SGD on weight (O, I, h, w) and affine (2, O) = gamma, beta by the gradients of the folded weight and bias;
  // norm (2, O) = 1 / sigma, mean; anchors are added to the gradients; first: there is no velocity yet; rate ()
  m.def(
      "update_folded_(Tensor grad, Tensor bias_grad, Tensor? anchor, Tensor? bias_anchor, Tensor weight, Tensor affine, "
      "Tensor norm, Tensor(a!) new_weight, Tensor(b!) new_affine, Tensor(c!) velocity, Tensor(d!) affine_velocity, "
      "Tensor(e!) folded, Tensor(f!) folded_bias, bool first, Tensor rate, float momentum, float decay, float scale) "
      "-> ()");

  // images (H, W, 3) uint8, unary (L, H, W) or, of K problems, (K, L, H, W) -> probabilities; labels (K, H, W) uint8 ->
  // labels alike; gaussian: (sxy, strength), bilateral: (sxy, srgb, strength), either may be empty; normalization:
  // 0 symmetric, 1 after, 2 before, 3 none; unsure: a label or -1; capacity: vertices of a lattice on CUDA devices, 0
  // for as many as there can be
  m.def(
      "dense_crf(Tensor[] images, Tensor[] unary, float[] gaussian, float[] bilateral, int iterations, "
      "int normalization, bool exact, int capacity) -> Tensor[]");
  m.def(
      "dense_crf_labels(Tensor[] images, Tensor[] labels, int n_labels, float confidence, int unsure, "
      "float[] gaussian, float[] bilateral, int iterations, int normalization, bool exact, int capacity) -> Tensor[]");

  // features (P, d) -> tensors that only these operators read (filled: as pydensecrf fills up fours of points); values (P, C) -> (P, C); unary (L, P) -> probabilities
  m.def("lattice(Tensor features, bool filled) -> Tensor[]");
  m.def("lattice_filter(Tensor values, Tensor[] lattice, bool transpose) -> Tensor");
  m.def(
      "mean_field(Tensor unary, Tensor[] lattices, float[] strengths, int[] normalizations, int iterations, "
      "bool exact) -> Tensor");

  // boundary (N, h, w) -> (N, P, h, w) float32 of the pairs of pixels closer than radius
  m.def("path_affinity(Tensor boundary, int radius, float beta) -> Tensor");
  m.def("path_affinity_backward(Tensor grad, Tensor boundary, int radius, float beta) -> Tensor");
  // displacement (N, 2, h, w), labels (N, h, w) uint8 -> (8,) float32: five sums, three counts
  m.def("pair_losses(Tensor boundary, Tensor displacement, Tensor labels, int radius) -> Tensor");
  m.def(
      "pair_losses_backward(Tensor grad, Tensor boundary, Tensor displacement, Tensor labels, int radius) "
      "-> (Tensor, Tensor)");
  // logits (N, L, h, w), labels (N, H, W) uint8 -> losses alike, float32; with them, fit (0 none, 1 clamp, 2 ignore, 3 pow)
  // and k where active () bool -> (4,) float64: sums of the losses of label 0 and of others, how many there are of each
  m.def("pixel_losses(Tensor logits, Tensor labels) -> Tensor");
  m.def(
      "pixel_loss_sums(Tensor logits, Tensor labels, Tensor losses, Tensor? active, int fit, float k) -> Tensor");
  m.def(
      "pixel_loss_sums_backward(Tensor grad, Tensor logits, Tensor labels, Tensor losses, Tensor? active, int fit, "
      "float k) -> Tensor");
  // images (N, C, H, W), maps (P, h, w), which (P,) int64, the image of each map -> images with what maps attend to taken
  // out (P, C, H, W), and the attention's sums (P,)
  m.def(
      "erase(Tensor images, Tensor maps, Tensor which, float sharpness, float level) -> (Tensor erased, Tensor areas)");
  m.def(
      "erase_backward(Tensor? grad, Tensor? grad_areas, Tensor images, Tensor maps, Tensor which, float sharpness, "
      "float level) -> Tensor");
  // each image's cams (C, h, w) and weights (P, h, w) of its pairs -> (C, h, w) float32
  m.def("random_walk(Tensor[] cams, Tensor[] weights, int radius, int steps) -> Tensor[]");
  // images (N, 3, H, W), maps (N, C, H, W) -> refined maps alike, float32; pamr: PAMR, else PAR
  m.def(
      "refine(Tensor[] images, Tensor[] maps, bool pamr, int[] dilations, int iterations, float w1, float w2) -> "
      "Tensor[]");
  // on the CPU alone: maps (n, H, W), or each side over `stride`, and mask (H, W) uint8 -> pixels (n_labels, n, T + 1) by
  // true label, class of the largest map and how many of the T ascending thresholds lie below it
  m.def("threshold_histogram(Tensor maps, Tensor mask, Tensor thresholds, int n_labels, int stride) -> Tensor");
  m.def("confusion_matrix(Tensor labels, Tensor mask, int n_labels) -> Tensor");

  // (..., H, W)
  m.def("normalize_cams(Tensor cams, float eps) -> Tensor");
  m.def("normalize_cams_(Tensor(a!) cams, float eps) -> ()");
}

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] =
#if defined(__clang__)
      "clang " __clang_version__;
#elif defined(__GNUC__)
      "gcc " __VERSION__;
#else
      "unknown";
#endif
#if defined(RIBFAST_WITH_CUDA)
  info["cuda"] = true;
  info["cuda_architectures"] = RIBFAST_CUDA_ARCHS;
#else
  info["cuda"] = false;
  info["cuda_architectures"] = "";
#endif
  info["cuda_reason"] = RIBFAST_CUDA_REASON;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(NDEBUG)
  info["debug"] = false;
#else
  info["debug"] = true;
#endif
  return info;
}

// How many threads a parallel loop really has: without OpenMP at compile time, ATen's would be a plain one.
int64_t parallel_threads() {
  std::mutex mutex;
  std::set<std::thread::id> threads;
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const std::lock_guard<std::mutex> lock(mutex);
    threads.insert(std::this_thread::get_id());
  });
  return static_cast<int64_t>(threads.size());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("parallel_threads", &parallel_threads);
  m.def("cpu_tier", [] { return ribfast::cpu::kernels().name; });
  m.def("compiled_cpu_tiers", [] { return ribfast::cpu::compiled_tiers(); });
}
