// The CUDA kernels behind C functions, launched with the geometry that csrc/cuda/*.cu gives them.
// Storage: 0 float64, 1 float32, 2 float16, 3 bfloat16.
#include "cuda_on_cpu.h"

#include "../../csrc/cuda/accumulate_cams.cuh"
#include "../../csrc/cuda/adapt.cuh"
#include "../../csrc/cuda/erase.cuh"
#include "../../csrc/cuda/gndrp.cuh"
#include "../../csrc/cuda/normalize_cams.cuh"
#include "../../csrc/cuda/pair_losses.cuh"
#include "../../csrc/cuda/path_affinity.cuh"
#include "../../csrc/cuda/random_walk.cuh"
#include "../../csrc/walk_series.h"
#include "../../csrc/cuda/refine.cuh"
#include "../../csrc/cuda/segmentation_loss.cuh"

using namespace ribfast::cuda;

namespace {

template <typename F>
void with_element(int storage, F&& f) {
  switch (storage) {
    case 0: return f(double{});
    case 1: return f(float{});
    case 2: return f(__half{});
    default: return f(__nv_bfloat16{});
  }
}

template <typename T, typename F>
void with_vector(bool wide, F&& f) {
  if (wide) {
    f(std::integral_constant<int, 16 / sizeof(T)>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

}  // namespace

extern "C" {

void gndrp(int storage, bool wide, unsigned order, const void* maps, const bool* present, int64_t count, int64_t n,
           double tau, bool divide_by_all, bool strict, void* pooled, void* stats) {
  with_element(storage, [&](auto element) {
    using T = decltype(element);
    with_vector<T>(wide, [&](auto vec) {
      emulator::launch(count, gndrp_threads(n, vec.value), order, [&] {
        gndrp_kernel<T, vec.value>(static_cast<const T*>(maps), present, n, tau, divide_by_all, strict,
                                   static_cast<Acc<T>*>(pooled), static_cast<Acc<T>*>(stats));
      });
    });
  });
}

void gndrp_backward(int storage, bool wide, unsigned order, const void* grad, const void* maps, const bool* present,
                    const void* stats, int64_t count, int64_t n, double tau, bool strict, void* result) {
  with_element(storage, [&](auto element) {
    using T = decltype(element);
    with_vector<T>(wide, [&](auto vec) {
      const int64_t blocks = gndrp_backward_blocks(n, vec.value);
      emulator::launch(count * blocks, kBackwardThreads, order, [&] {
        gndrp_backward_kernel<T, vec.value>(static_cast<const Acc<T>*>(grad), static_cast<const T*>(maps), present,
                                            static_cast<const Acc<T>*>(stats), n, blocks, tau, strict,
                                            static_cast<T*>(result));
      });
    });
  });
}

void normalize_cams(int storage, bool wide, unsigned order, const void* cams, int64_t count, int64_t n, double eps,
                    void* result) {
  with_element(storage, [&](auto element) {
    using T = decltype(element);
    with_vector<T>(wide, [&](auto vec) {
      const int64_t parts = normalize_parts(n, vec.value);
      std::vector<Acc<T>> maxima(count * parts);
      emulator::launch(count * parts, kNormalizeThreads, order, [&] {
        part_maximum_kernel<T, vec.value>(static_cast<const T*>(cams), n, parts, maxima.data());
      });
      emulator::launch(count * parts, kNormalizeThreads, order, [&] {
        normalize_kernel<T, vec.value>(static_cast<const T*>(cams), n, parts, maxima.data(), eps,
                                       static_cast<T*>(result));
      });
    });
  });
}

// Images of one number of scales; maps, shapes (V, C, h, w) scale after scale, image after image;
// sizes: H, W, padded H, padded W of each image.
void accumulate_cams(int storage, unsigned order, int images, int scales, const void** maps, const int64_t* shapes,
                     const int32_t* sizes, void** out, bool relu, bool add) {
  with_element(storage, [&](auto element) {
    using T = decltype(element);
    constexpr int kImages = 8;
    static CamBatch<kImages> batch;
    batch.count = images, batch.relu = relu, batch.add = add;
    int64_t blocks = 0;
    for (int i = 0; i < images; ++i) {
      CamImage& image = batch.images[i];
      image = {};
      image.count = scales;
      for (int s = 0; s < scales; ++s) {
        const int64_t* shape = shapes + 4 * (i * scales + s);
        image.scales[s] = {maps[i * scales + s], shape[0] == 2 ? shape[1] * shape[2] * shape[3] : 0,
                           static_cast<int32_t>(shape[2]), static_cast<int32_t>(shape[3])};
        image.channels = static_cast<int32_t>(shape[1]);
      }
      image.out = out[i];
      image.height = sizes[4 * i], image.width = sizes[4 * i + 1];
      image.padded_height = sizes[4 * i + 2], image.padded_width = sizes[4 * i + 3];
      image.first_block = static_cast<uint32_t>(blocks);
      blocks += accumulate_blocks(image);
    }
    emulator::launch(blocks, kWarp * kSweepWarps, order, [&] { accumulate_kernel<T, kImages>(batch); });
  });
}

// One entry a map; sizes as above, one for each map.
void accumulate_cams_backward(int storage, unsigned order, int count, const void** maps, const int64_t* shapes,
                              const int32_t* sizes, const void** grads, void** results, bool relu) {
  with_element(storage, [&](auto element) {
    using T = decltype(element);
    constexpr int kEntries = 32;
    static CamGradients<kEntries> batch;
    batch.count = count, batch.relu = relu;
    int64_t blocks = 0;
    for (int i = 0; i < count; ++i) {
      const int64_t* shape = shapes + 4 * i;
      const int32_t* size = sizes + 4 * i;
      batch.entries[i] = {maps[i],
                          grads[i],
                          results[i],
                          shape[0] == 2 ? shape[1] * shape[2] * shape[3] : 0,
                          static_cast<int32_t>(shape[1]),
                          static_cast<int32_t>(shape[2]),
                          static_cast<int32_t>(shape[3]),
                          size[0],
                          size[1],
                          size[2],
                          size[3],
                          static_cast<uint32_t>(blocks)};
      blocks += accumulate_backward_blocks(batch.entries[i]);
    }
    emulator::launch(blocks, kWarp * kGatherWarps, order, [&] { accumulate_backward_kernel<T, kEntries>(batch); });
  });
}

// shortcut and mask may be null
void activate(int storage, bool wide, unsigned order, void* y, const void* shortcut, const void* mask, int64_t cells,
              int64_t channels, double limit) {
  with_element(storage, [&](auto element) {
    using T = decltype(element);
    with_vector<T>(wide, [&](auto vec) {
      emulator::launch(activate_blocks(cells, channels, vec.value), kCellThreads, order, [&] {
        activate_kernel<T, vec.value>(static_cast<T*>(y), static_cast<const T*>(shortcut), static_cast<const T*>(mask),
                                      cells, channels / vec.value, limit);
      });
    });
  });
}

// Returns the number of strips whose sums were added up.
int64_t activate_backward(int storage, bool wide, unsigned order, const void* grad, const void* y, int64_t cells,
                          int64_t channels, double limit, void* result, void* sums_) {
  int64_t strips = 0;
  with_element(storage, [&](auto element) {
    using T = decltype(element);
    auto* sums = static_cast<Acc<T>*>(sums_);
    with_vector<T>(wide, [&](auto vec) {
      const Strips s = share_strips(cells, channels, vec.value);
      strips = s.count;
      std::vector<Acc<T>> partial(s.count * channels, static_cast<Acc<T>>(NAN));
      emulator::launch(s.count * s.tiles, kCellThreads, order, [&] {
        activate_backward_kernel<T, vec.value>(static_cast<const T*>(grad), static_cast<const T*>(y), cells, channels,
                                               s, limit, static_cast<T*>(result), s.count == 1 ? sums : partial.data());
      });
      if (s.count == 1) return;
      emulator::launch((channels + kWarp - 1) / kWarp, kSumThreads, order,
                       [&] { sum_strips_kernel<Acc<T>>(partial.data(), s.count, channels, sums); });
    });
  });
  return strips;
}

// given: grad, its bias', the anchor, its bias' (which may be null), weight, affine, norm, rate; made: new weight and
// affine, velocities, the folded weight and bias. Storage: not float64.
void update_folded(int storage, bool wide, unsigned order, const void** given, void** made, int64_t rows, int64_t n,
                   float momentum, float decay, float scale, bool first) {
  with_element(storage, [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, double>) {
      const auto elements = [&](int i) { return static_cast<const T*>(given[i]); };
      const auto floats = [&](int i) { return static_cast<const float*>(given[i]); };
      const auto state = [&](int i) { return static_cast<float*>(made[i]); };
      const FoldedUpdate<T> update{
          elements(0), elements(1), elements(2), elements(3), floats(4), floats(5), floats(6), floats(7), state(0),
          state(1),    state(2),    state(3),    static_cast<T*>(made[4]),   static_cast<T*>(made[5]),   rows, n,
          momentum,    decay,       1 / scale,   first};
      emulator::launch(rows, update_threads(n), order, [&] {
        wide ? update_folded_kernel<T, 4>(update) : update_folded_kernel<T, 1>(update);
      });
    }
  });
}

void path_affinity(unsigned order, const float* boundary, int64_t count, int32_t height, int32_t width, int radius,
                   float beta, float* out, const float* grad, float* result) {
  const auto tiles_y = static_cast<int32_t>(pair_tiles(height, 1)), tiles_x = static_cast<int32_t>(pair_tiles(1, width));
  const dim3 grid(static_cast<unsigned>(count * tiles_y * tiles_x));
  emulator::launch(grid, kPairThreads, order,
                   [&] { path_affinity_kernel(boundary, height, width, tiles_y, tiles_x, radius, beta, out); });
  emulator::launch(grid, kPairThreads, order, [&] {
    path_affinity_backward_kernel(grad, boundary, height, width, tiles_y, tiles_x, radius, beta, result);
  });
}

// sums: of the blocks, added up here; results: the boundary's and the displacement's gradient.
void pair_losses(unsigned order, const float* boundary, const float* displacement, const uint8_t* labels, int64_t count,
                 int32_t height, int32_t width, int radius, float* sums, const float* grads, float* to_boundary,
                 float* to_displacement) {
  const int32_t rows = height - (radius - 1), columns = width - 2 * (radius - 1);
  if (rows <= 0 || columns <= 0) return;
  const auto tiles_y = static_cast<int32_t>(pair_tiles(rows, 1)), tiles_x = static_cast<int32_t>(pair_tiles(1, columns));
  const PairMaps maps{boundary, displacement, labels, height, width, rows, columns, tiles_y, tiles_x, radius};
  const auto blocks = static_cast<unsigned>(count * tiles_y * tiles_x);
  std::vector<float> partial(blocks * kLossSums);
  emulator::launch(blocks, kPairThreads, order, [&] { pair_losses_kernel(maps, partial.data()); });
  for (size_t i = 0; i < partial.size(); ++i) sums[i % kLossSums] += partial[i];
  emulator::launch(blocks, kPairThreads, order,
                   [&] { pair_losses_backward_kernel(maps, grads, to_boundary, to_displacement); });
}

// shape: images, labels, height, width, rows, columns; sums: those of blocks are added up here. Storage: not float64.
void segmentation_loss(int storage, unsigned order, const void* logits_, const uint8_t* labels, const int32_t* shape,
                       const bool* active, int fit, float k, float* losses, double* sums, const double* grads,
                       void* result) {
  with_element(storage, [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, double>) {
      const auto* logits = static_cast<const T*>(logits_);
      const LossMaps maps{labels, shape[1], shape[2], shape[3], shape[4], shape[5]};
      const LossFit fitted{active, fit, k};
      const int64_t cells = int64_t{shape[0]} * shape[2] * shape[3], n = int64_t{shape[0]} * shape[4] * shape[5];
      emulator::launch(dim3(cells), kLossThreads, order, [&] { pixel_losses_kernel<T>(logits, maps, losses); });
      const int64_t blocks = (n + kLossSumPixels - 1) / kLossSumPixels;
      std::vector<double> parts(blocks * 4, NAN);
      emulator::launch(dim3(blocks), kLossSumThreads, order,
                       [&] { pixel_loss_sums_kernel(losses, maps, n, fitted, parts.data()); });
      for (size_t i = 0; i < parts.size(); ++i) sums[i % 4] += parts[i];
      std::vector<float> corners(cells * 4 * shape[1], NAN);
      emulator::launch(dim3(cells), kLossThreads, order, [&] {
        pixel_losses_backward_kernel<T>(grads, logits, losses, maps, fitted, corners.data());
      });
      emulator::launch(dim3((cells * shape[1] + kGatherThreads - 1) / kGatherThreads), kGatherThreads, order, [&] {
        gather_corners_kernel<T>(corners.data(), maps, cells * shape[1], static_cast<T*>(result));
      });
    }
  });
}

// types: of images and maps; shape: images, channels, rows, columns, maps, height, width; strides: of images, erased, and
// its gradient, four each, and of maps, three; group: as csrc/cuda/erase.cu has it, forward and backward.
void erase(const int* types, unsigned order, const void* images_, const void* maps_, const int64_t* which,
           const int32_t* shape, const int64_t* strides, const int* group, double sharpness, double level,
           void* erased_, void* areas_, const void* grads_, const void* grad_areas_, void* result) {
  const auto pixels = [&](int i) {
    return Pixels{strides[4 * i], strides[4 * i + 1], strides[4 * i + 2], strides[4 * i + 3]};
  };
  with_element(types[0], [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto accumulator) {
      using S = decltype(accumulator);
      EraseMaps maps{maps_, strides[12], strides[13], strides[14], which, shape[0], types[1], shape[5], shape[6],
                     shape[1], shape[2], shape[3], group[0], double(S(shape[5]) / S(shape[2])),
                     double(S(shape[6]) / S(shape[3])), sharpness, level};
      const auto *images = static_cast<const T*>(images_), *grads = static_cast<const T*>(grads_);
      const auto blocks = static_cast<unsigned>(shape[4] * shape[5]);
      std::vector<S> sums(blocks, NAN), corners(blocks * 4 * shape[6], NAN);
      std::vector<int32_t> done(shape[4]);
      emulator::launch(blocks, kEraseThreads, order, [&] {
        erase_kernel<T, S>(maps, images, pixels(0), static_cast<T*>(erased_), pixels(1), sums.data(), done.data(),
                           static_cast<S*>(areas_));
      });
      maps.group = group[1];
      done.assign(done.size(), 0);
      emulator::launch(blocks, kEraseThreads, order, [&] {
        erase_backward_kernel<T, S>(maps, images, pixels(0), grads, pixels(2), static_cast<const S*>(grad_areas_),
                                    corners.data(), done.data(), result);
      });
    };
    if (types[1] == 0) {
      run(double{});
    } else {
      run(float{});
    }
  });
}

// Images of one number of classes; sizes: height and width of each; even, odd, results and inverses are scratch but for
// the one that holds the result: results, or where the walk is plain even or odd by the steps.
void random_walk(unsigned order, int images, const float** cams, const float** weights, const int32_t* sizes,
                 int classes, int radius, int64_t steps, float** even, float** odd, float** results, float** inverses) {
  static WalkBatch<8> batch;
  const ribfast::WalkSeries series = ribfast::walk_series(steps, ribfast::kWalkTolerance);
  const bool plain = series.factors.empty();
  batch.count = images, batch.radius = radius;
  int64_t blocks = 0;
  for (int i = 0; i < images; ++i) {
    batch.entries[i] = {cams[i], weights[i], even[i], odd[i], plain ? nullptr : results[i], inverses[i], classes,
                        sizes[2 * i], sizes[2 * i + 1], static_cast<uint32_t>(blocks)};
    blocks += walk_blocks(sizes[2 * i], sizes[2 * i + 1]);
  }
  const dim3 grid(static_cast<unsigned>(blocks));
  emulator::launch(grid, kWalkPixels, order,
                   [&] { walk_begin_kernel<8>(batch, plain ? 0.0f : static_cast<float>(series.factors[0])); });
  for (int64_t k = 1; k <= series.applications; ++k) {
    const float factor = plain ? 0.0f : static_cast<float>(series.factors[k]);
    emulator::launch(grid, kWalkPixels, order, [&] {
      const bool from_even = k % 2 == 1, twice = !plain && k > 1;
      if (radius <= 5 && classes == 1) {
        walk_step_kernel<4, 1, 8>(batch, from_even, twice, factor);
      } else if (radius <= 5) {
        walk_step_kernel<4, kWalkClasses, 8>(batch, from_even, twice, factor);
      } else {
        walk_step_kernel<ribfast::kLargestRadius - 1, kWalkClasses, 8>(batch, from_even, twice, factor);
      }
    });
  }
}

// Images (3, H, W) and maps (C, H, W) of any sizes in one batch; shapes: C, H, W of each.
void refine(unsigned order, int count, const float** images, const float** maps, const int32_t* shapes, bool pamr,
            const int64_t* dilations, int32_t dilation_count, int64_t iterations, float w1, float w2, float** results) {
  constexpr int kImages = 8;
  static RefineBatch<kImages> batch;
  batch.count = count, batch.options = {};
  batch.options.dilation_count = dilation_count, batch.options.w1 = w1, batch.options.pamr = pamr;
  for (int i = 0; i < dilation_count; ++i) batch.options.dilations[i] = static_cast<int32_t>(dilations[i]);
  ribfast::position_weights(dilations, dilation_count, w1, w2, batch.options.position);
  std::vector<std::vector<float>> memory;
  for (int i = 0; i < count; ++i) {
    const int32_t* shape = shapes + 3 * i;
    const int64_t size = int64_t{shape[1]} * shape[2];
    memory.emplace_back(size * dilation_count * ribfast::kAround, NAN);
    memory.emplace_back(size * shape[0], NAN);
    batch.images[i] = {images[i], maps[i], memory[2 * i].data(), memory[2 * i + 1].data(), results[i],
                       shape[0],  shape[1], shape[2], 0};
  }
  const auto run = [&](auto kernel, dim3 grid, unsigned threads, const auto&... arguments) {
    emulator::launch(grid, threads, order, [&] { kernel(arguments...); });
  };
  refine_images(run, batch, iterations);
}

}  // extern "C"
