"""Random small calls of every operator, valid and invalid, in a build with AddressSanitizer and UBSan.

Public functions and the schemas under them, in each of this machine's CPU tiers: odd sizes and strides, every dtype,
NaN and infinity, tiny and huge numbers, and arguments that are wrong. An argument may be refused, with a ValueError,
TypeError or RuntimeError; nothing may crash, touch memory that is not its own, or compute what C++ leaves undefined.
Every call depends on the seed and its number alone: --seed S --first N --calls 1 repeats one.
"""

import argparse
import collections
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ribfast import _ext, ops
from ribfast.ops import contract

ROOT = Path(__file__).parents[1]
SIDES = (1, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33)
REFUSALS = (ValueError, TypeError, RuntimeError)
OPTIONS = {
    # Python and ATen do not free all at exit; an allocation that is too large fails as it does elsewhere
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_odr_violation=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "OMP_NUM_THREADS": "2",
}


class Draw:
    """Arguments drawn from one generator."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)

    def pick(self, *choices):
        return choices[self.random.integers(len(choices))]

    def chance(self, probability):
        return bool(self.random.random() < probability)

    def side(self):
        return self.pick(*SIDES)

    def count(self, most):
        return int(self.random.integers(1, most + 1))

    def number(self, usual):
        """Around `usual`, or of any order of magnitude."""
        if self.chance(0.7):
            return float(usual * self.random.uniform(0.3, 3))
        return float(10.0 ** self.random.uniform(-30, 30)) * self.pick(1, 1, 1, -1)

    def floats(self, *shape, dtype=None):
        """A tensor of any float dtype with ordinary values, or with some that are not."""
        values = torch.from_numpy(self.random.normal(0, 3, shape))
        odd = self.pick(None, None, None, 0.0, -0.0, 1e30, -1e30, 1e-42, float("nan"), float("inf"), -float("inf"))
        if odd is not None:
            values[torch.from_numpy(self.random.random(shape) < self.pick(0.02, 0.5, 1.0))] = odd
        return self.strided(values.to(dtype or self.pick(*contract.FLOATS)))

    def bytes(self, *shape):
        return self.strided(torch.from_numpy(self.random.integers(0, 256, shape).astype(np.uint8)))

    def bools(self, *shape):
        return self.strided(torch.from_numpy(self.random.random(shape) < 0.6))

    def strided(self, values):
        """The same values laid out in another way."""
        how = self.pick("plain", "plain", "turned", "steps", "inside", "expanded")
        if how == "turned" and values.ndim > 1:
            a, b = self.random.choice(values.ndim, 2, replace=False)
            return values.transpose(a, b).contiguous().transpose(a, b)
        if how == "steps" and values.ndim:
            return torch.stack([values, values], -1).flatten(-2)[..., ::2]
        if how == "inside":
            room = torch.empty(values.numel() + 3, dtype=values.dtype)
            return room[1 : 1 + values.numel()].view(values.shape).copy_(values)
        if how == "expanded" and values.ndim and values.shape[0]:
            return values[:1].expand(values.shape)
        return values

    def wrong(self, value):
        """Something that probably may not stand in the place of `value`."""
        general = (None, "kept", -1, 0, 3, 2**70, 1e300, float("nan"), float("inf"), [], (), [None], torch.zeros(()))
        plain = isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.layout == torch.strided
        if plain and self.chance(0.8):
            changes = (
                lambda: value[..., :-1] if value.ndim else value,
                lambda: value[:0] if value.ndim else value,
                lambda: value[None],
                lambda: value.flatten(),
                lambda: value.flip(-1)[..., None] if value.ndim else value,
                lambda: torch.cat([value, value]) if value.ndim else value,
                lambda: value.to(self.pick(*contract.FLOATS, torch.int64, torch.uint8, torch.bool, torch.complex64)),
                lambda: value.to("meta"),
                lambda: value.to_sparse(),
                lambda: value.clone().requires_grad_(value.is_floating_point()),
            )
            return self.pick(*changes)()
        if isinstance(value, (list, tuple)) and value and self.chance(0.8):
            at = int(self.random.integers(len(value)))
            changed = [*value[:at], *self.pick([], [value[at]] * 2, [self.wrong(value[at])]), *value[at + 1 :]]
            return type(value)(changed)
        return self.pick(*general)


def maps_of_scales(d, dtype=None):
    """(maps of every scale, size, padded)"""
    channels, views, dtype = d.count(5), d.pick(1, 2), dtype or d.pick(*contract.FLOATS)
    maps = [d.floats(views, channels, d.side(), d.side(), dtype=dtype) for _ in range(d.count(5))]
    size = (d.side(), d.side())
    return maps, size, d.pick(None, tuple(side + d.pick(0, 1, 9) for side in size))


def room_for(maps, size):
    """What accumulate_cams adds into."""
    dtype = torch.float64 if maps[0].dtype == torch.float64 else torch.float32
    return torch.zeros(maps[0].shape[1], *size, dtype=dtype)


def pooled(d):
    shape = (d.count(4), d.count(6), d.side(), d.side())
    options = dict(tau=d.pick(0.4, d.number(0.5)), divide_by=d.pick("kept", "all"), strict=d.chance(0.5))
    return [d.floats(*shape), d.bools(*shape[:2])], options


def merged(d):
    maps, size, padded = maps_of_scales(d)
    out = d.pick(None, room_for(maps, size))
    return [maps, size], dict(padded=padded, relu=d.chance(0.7), out=out)


def merged_batch(d):
    dtype = d.pick(*contract.FLOATS)
    images = [maps_of_scales(d, dtype) for _ in range(d.count(3))]
    maps, sizes = [i[0] for i in images], [i[1] for i in images]
    padded = d.pick(None, [tuple(side + d.pick(0, 5) for side in size) for size in sizes])
    return [maps, sizes], dict(padded=padded, relu=d.chance(0.7))


def merged_flat(d):
    maps, size, padded = maps_of_scales(d)
    return maps, [len(maps)], list(size), list(padded or size), d.chance(0.5)


def merged_raw(d):
    return [*merged_flat(d)], {}


def merged_raw_into(d):
    maps, counts, size, padded, relu = merged_flat(d)
    return [[room_for(maps, size)], maps, counts, padded, relu], {}


def normalised(d):
    shape = [d.side() for _ in range(d.pick(2, 3, 4))]
    return [d.floats(*shape)], dict(eps=d.pick(1e-5, d.number(1e-5)), inplace=d.chance(0.3))


def channels_last(d, shape, dtype):
    values = d.floats(*shape, dtype=dtype)
    return values.contiguous(memory_format=torch.channels_last) if d.chance(0.9) else values


def activation(d):
    shape, dtype = (d.pick(1, 1, 2), d.side(), d.side(), d.side()), d.pick(*contract.FLOATS)
    mask = torch.from_numpy((d.random.random((shape[0], 1, *shape[2:])) < 0.7).astype(np.float64)).to(dtype)
    y, shortcut = (channels_last(d, shape, dtype) for _ in range(2))
    return [y, d.pick(None, shortcut), d.pick(None, mask), d.number(6.0)], {}


def activation_backward(d):
    shape, dtype = (1, d.side(), d.side(), d.side()), d.pick(*contract.FLOATS)
    return [channels_last(d, shape, dtype), channels_last(d, shape, dtype), d.number(6.0)], {}


def folded_update(d):
    """Thirteen tensors: most calls lay all of them out as is demanded, or few would be answered."""
    kernel, tidy = d.pick(1, 1, 3), d.chance(0.8)
    shape, dtype = (d.side(), d.side(), kernel, kernel), d.pick(*contract.FLOATS[:3], *contract.FLOATS)

    def weights(dtype):
        if tidy:
            return d.floats(*shape, dtype=dtype).clone(memory_format=torch.channels_last)
        return channels_last(d, shape, dtype)

    def vectors(*shape, dtype=torch.float32):
        drawn = d.floats(*shape, dtype=dtype)
        return drawn.clone(memory_format=torch.contiguous_format) if tidy else drawn

    grad, anchor, folded = (weights(dtype) for _ in range(3))
    weight, new_weight, velocity = (weights(torch.float32) for _ in range(3))
    bias_grad, bias_anchor, folded_bias = (vectors(shape[0], dtype=dtype) for _ in range(3))
    affine, norm, new_affine, affine_velocity = (vectors(2, shape[0]) for _ in range(4))
    anchors = d.pick([None, None], [anchor, bias_anchor])
    states = [weight, affine, norm, new_weight, new_affine, velocity, affine_velocity, folded, folded_bias]
    rate = torch.tensor(d.number(0.1))
    return [grad, bias_grad, *anchors, *states, d.chance(0.5), rate, d.number(0.1), d.number(0.1), d.number(4.0)], {}


def image_and_maps(d, *head):
    """Of one size, or the maps now and then of another."""
    size, image_dtype = (d.side(), d.side()), d.pick(torch.uint8, *contract.FLOATS)
    image = d.bytes(*head, 3, *size) if image_dtype == torch.uint8 else d.floats(*head, 3, *size, dtype=image_dtype)
    return image, d.floats(*head, d.pick(0, 1, 2, 3, 7, 9, 17), *size)


def refining(d):
    dilations = d.pick((1, 2, 4, 8, 12, 24), [d.pick(1, 2, 3, 7, 40, 2**24 - 1) for _ in range(d.count(5))])
    return dict(
        method=d.pick("par", "pamr"), dilations=dilations, iterations=d.pick(0, 1, 2, 3), w1=abs(d.number(0.3)),
        w2=d.number(0.01),
    )  # fmt: skip


def refined(d):
    if d.chance(0.5):
        return [*image_and_maps(d, d.pick(0, 1, 2))], refining(d)
    pairs = [image_and_maps(d) for _ in range(d.count(3))]
    return [[i for i, _ in pairs], [m for _, m in pairs]], refining(d)


def refined_raw(d):
    image, maps = image_and_maps(d, d.pick(0, 1, 2))
    named = refining(d)
    return [[image], [maps], d.chance(0.5), list(named["dilations"]), named["iterations"], named["w1"], named["w2"]], {}


def image_and_energies(d):
    height, width, labels = d.side(), d.side(), d.count(40)
    problems = d.pick((), (), (0,), (1,), (d.count(7),))
    return d.bytes(height, width, 3), d.floats(*problems, labels, height, width)


def terms_of(d):
    return dict(
        gaussian=d.pick(None, (d.number(3), d.number(3))),
        bilateral=d.pick(None, (d.number(50), d.number(10), d.number(5))),
        iterations=d.pick(0, 1, 2, 3),
        normalization=d.pick("symmetric", "after", "before", "none"),
    )


def fields(d):
    pairs = [image_and_energies(d) for _ in range(d.count(3))]
    how = dict(exact=d.chance(0.5), nan="propagate", differentiable=d.chance(0.1))
    return [[i for i, _ in pairs], [u for _, u in pairs]], terms_of(d) | how


def terms_raw(d):
    terms = [d.number(3), d.number(3)], [d.number(50), d.number(10), d.number(5)]
    return [*terms, d.pick(0, 2), d.pick(0, 1, 2, 3), d.chance(0.5), d.pick(0, 100)]


def fields_raw(d):
    image, energies = image_and_energies(d)
    return [[image], [energies], *terms_raw(d)], {}


def label_maps(d):
    """Images, their label maps, and the number of labels; one label in ten maps is too large."""
    labels, images, maps = d.count(40), [], []
    for _ in range(d.count(3)):
        height, width = d.side(), d.side()
        shape = d.pick((height, width), (d.count(4), height, width))
        images.append(d.bytes(height, width, 3))
        given = d.random.integers(0, labels + d.chance(0.1), shape).astype(np.uint8)
        maps.append(d.strided(torch.from_numpy(given)))
    return images, maps, labels


def label_fields(d):
    how = dict(confidence=d.pick(0.7, d.number(0.5)), unsure=d.pick(None, 0, 255), exact=d.chance(0.5))
    return [*label_maps(d)], terms_of(d) | how


def label_fields_raw(d):
    images, maps, labels = label_maps(d)
    maps = [given if given.ndim == 3 else given[None] for given in maps]
    return [images, maps, labels, d.pick(0.7, d.number(0.5)), d.pick(-1, 0, 255), *terms_raw(d)], {}


def features(d, points):
    return d.floats(points, d.count(8), dtype=torch.float32)


def lattice_and_values(d):
    points = d.pick(0, 1, 2, 3, 15, 16, 17, 63, 129)
    values = d.floats(points, d.pick(0, 1, 2, 4, 7, 20, 36)) if d.chance(0.9) else d.floats(points)
    return [features(d, points), values], dict(filled=d.chance(0.3), transpose=d.chance(0.3))


def filtered(features, values, filled=False, transpose=False):
    return ops.Lattice(features, filled=filled).filter(values, transpose=transpose)


def filtered_raw(features, values, filled=False, transpose=False, spoil=None):
    """Through the raw operators, with one of the lattice's tensors spoilt."""
    tensors = torch.ops.ribfast.lattice(features, filled)
    if spoil is not None:
        tensors[spoil % len(tensors)] = Draw([spoil]).wrong(tensors[spoil % len(tensors)])
    return torch.ops.ribfast.lattice_filter(values, tensors, transpose)


def lattices_of_field(d):
    points, count = d.pick(1, 2, 15, 16, 17, 63, 129), d.pick(0, 1, 2)
    drawn = [features(d, points) for _ in range(count)]
    names = [d.pick("symmetric", "after", "before", "none") for _ in drawn]
    options = dict(normalizations=names, iterations=d.pick(0, 1, 3), exact=d.chance(0.5), nan="propagate")
    return [d.floats(d.count(40), points), drawn, [d.number(3) for _ in drawn]], options


def field_over_lattices(unary, features, strengths, **options):
    return ops.mean_field(unary, [ops.Lattice(each) for each in features], strengths, **options)


def field_over_lattices_raw(unary, features, strengths, normalizations=(), iterations=1, exact=False, nan=None):
    tensors = [tensor for each in features for tensor in torch.ops.ribfast.lattice(each, exact)]
    return torch.ops.ribfast.mean_field(unary, tensors, strengths, [len(name) % 4 for name in normalizations],
                                        iterations, exact)  # fmt: skip


def boundary_of(d, *shape):
    """Mostly between 0 and 1, where affinities are asked for."""
    values = d.floats(*shape)
    return values.sigmoid() if d.chance(0.8) else values


def paths(d):
    beta = d.pick(1.0, 10.0, d.number(2))
    return [boundary_of(d, d.count(3), d.side(), d.side()), d.pick(2, 3, 5, 10, 16), beta], {}


def paths_backward(d):
    (boundary, radius, beta), _ = paths(d)
    count, height, width = boundary.shape
    return [d.floats(count, len(ops.pair_offsets(radius)), height, width), boundary, radius, beta], {}


def pairs_of_labels(d):
    count, height, width, radius = d.count(3), d.side(), d.side(), d.pick(2, 3, 5, 10)
    labels = d.bytes(count, height, width)
    if d.chance(0.8):
        labels = torch.where(labels < 200, labels % 3, 255).to(torch.uint8)
    return [boundary_of(d, count, height, width), d.floats(count, 2, height, width), labels, radius], {}


def pixels(d):
    """Logits, and labels of which one map in ten holds one that is too large."""
    images, labels = d.count(3), d.pick(1, 2, 5, 16, 21, 40, 255)
    return d.floats(images, labels, d.side(), d.side()), mask_of(d, (images, d.side(), d.side()), min(labels, 254))


def pixel_losses(d):
    logits, labels = pixels(d)
    counts = d.pick(None, d.floats(3, dtype=torch.float64))
    fit = d.pick(None, "clamp", "ignore", "pow")
    options = dict(under_fitting=fit, beta=d.number(0.5), k=d.pick(0.5, d.number(0.5)), balanced=d.chance(0.5))
    return [logits, labels], options | dict(counts=counts, world=d.count(3))


def pixel_loss_sums(d):
    logits, labels = pixels(d)
    active = d.pick(None, torch.tensor(True), torch.tensor(False))
    fit = d.pick(0, 1, 2, 3)
    losses = d.floats(*labels.shape, dtype=torch.float32)
    return [logits, labels, losses, active, fit, d.pick(0.5, d.number(0.5))], {}


def erasing(d):
    """Images of any layout; in one call of ten a map of an image that there is not."""
    count, images = d.pick(0, 1, 1, 2, 5), d.count(4)
    pixels = d.floats(images, d.pick(1, 2, 3, 3, 4, 6), d.side(), d.side())
    if d.chance(0.4):
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    which = torch.from_numpy(d.random.integers(0, images + d.chance(0.1), count))
    options = dict(sharpness=d.pick(100.0, d.number(10)), level=d.pick(0.5, d.number(0.5)))
    return [pixels, d.floats(count, d.side(), d.side()), d.strided(which)], options


def erasing_maps(d):
    (images, maps, which), options = erasing(d)
    return [maps, images, which], options


def erased_from_maps(maps, images, which, **options):
    erased, areas = ops.erase(images, maps, which, **options)
    return erased.sum() + areas.sum()


def erasing_raw(d):
    given, options = erasing(d)
    return [*given, *options.values()], {}


def erasing_backward(d):
    (images, maps, which), options = erasing(d)
    grad = d.pick(None, d.floats(len(maps), *images.shape[1:], dtype=d.pick(None, images.dtype)))
    return [grad, d.pick(None, d.floats(len(maps))), images, maps, which, *options.values()], {}


def walked(d):
    """One image or several; log2_steps where it is not too slow."""
    options = dict(beta=d.pick(10.0, d.number(2)), log2_steps=d.pick(0, 1, 5, 8), radius=d.pick(2, 5, 5, 9))
    sizes = [(d.count(5), d.side(), d.side()) for _ in range(d.count(3))]
    cams, edges = [d.floats(*size) for size in sizes], [boundary_of(d, *size[1:]) for size in sizes]
    if d.chance(0.3):
        cams, edges = cams[0], edges[0]
    if d.chance(0.3):
        pairs = len(ops.pair_offsets(options["radius"]))
        each = edges if isinstance(edges, list) else [edges]
        weights = [boundary_of(d, pairs, *edge.shape) for edge in each]
        return [cams], options | {"affinity": weights if isinstance(edges, list) else weights[0]}
    return [cams, edges], options


def walked_raw(d):
    radius = d.pick(2, 5, 9, 16)
    sizes = [(d.count(5), d.side(), d.side()) for _ in range(d.count(3))]
    weights = [boundary_of(d, len(ops.pair_offsets(radius)), *size[1:]) for size in sizes]
    return [[d.floats(*size) for size in sizes], weights, radius, d.pick(1, 2, 3, 64, 256)], {}


def mask_of(d, size, n_labels):
    """One mask in ten holds a label that is too large."""
    labels = d.random.integers(0, n_labels + d.chance(0.1), size).astype(np.uint8)
    labels[d.random.random(size) < 0.1] = 255
    return d.strided(torch.from_numpy(labels))


def counted(d):
    size, stride, n_labels = (d.side(), d.side()), d.pick(1, 1, 4, 4, 3), d.count(30)
    maps = d.floats(d.count(5), *(-(-side // stride) for side in size))
    thresholds = np.sort(d.random.normal(0, d.pick(0, 1, 1e30), d.pick(1, 2, 61, 200)))
    return [maps, mask_of(d, size, n_labels), thresholds.tolist(), n_labels], dict(stride=stride)


def counted_raw(d):
    (maps, mask, thresholds, n_labels), options = counted(d)
    return [maps, mask, d.strided(torch.tensor(thresholds)), n_labels, options["stride"]], {}


def compared(d):
    size, n_labels = (d.side(), d.side()), d.pick(1, 21, 255)
    labels = d.strided(torch.from_numpy(d.random.integers(0, n_labels, size).astype(np.uint8)))
    return [labels, mask_of(d, size, min(n_labels, 254)), n_labels], {}


def pooled_raw_backward(d):
    n, c, h, w = d.count(4), d.count(6), d.side(), d.side()
    maps = d.floats(n, c, h, w)
    stats = d.floats(n, c, 2, dtype=torch.float64 if maps.dtype == torch.float64 else torch.float32)
    return [d.floats(n, c), maps, d.bools(n, c), stats, d.number(0.5), d.chance(0.5)], {}


def with_gradient(op):
    """op, and its backward where there is something to differentiate."""

    def call(maps, *arguments, **options):
        def leaf(value):
            return value.detach().requires_grad_() if isinstance(value, torch.Tensor) else value

        maps = [leaf(m) for m in maps] if isinstance(maps, list) else leaf(maps)
        op(maps, *arguments, **options).sum().backward()

    return call


def rows():
    """name: (function, what draws its positional and named arguments)"""
    raw = torch.ops.ribfast
    return {
        "gndrp": (ops.gndrp, pooled),
        "gndrp, backward": (with_gradient(ops.gndrp), pooled),
        "accumulate_cams": (ops.accumulate_cams, merged),
        "accumulate_cams, backward": (with_gradient(ops.accumulate_cams), merged),
        "accumulate_cams_batch": (ops.accumulate_cams_batch, merged_batch),
        "normalize_cams": (ops.normalize_cams, normalised),
        "threshold_histogram": (ops.threshold_histogram, counted),
        "confusion_matrix": (ops.confusion_matrix, compared),
        "dense_crf": (ops.dense_crf, fields),
        "dense_crf_labels": (ops.dense_crf_labels, label_fields),
        "refine": (ops.refine, refined),
        "Lattice": (filtered, lattice_and_values),
        "mean_field": (field_over_lattices, lattices_of_field),
        "path_affinity": (ops.path_affinity, paths),
        "path_affinity, backward": (with_gradient(ops.path_affinity), paths),
        "pair_losses": (ops.pair_losses, pairs_of_labels),
        "pair_losses, backward": (with_gradient(ops.pair_losses), pairs_of_labels),
        "segmentation_loss": (ops.segmentation_loss, pixel_losses),
        "segmentation_loss, backward": (with_gradient(ops.segmentation_loss), pixel_losses),
        "erase": (ops.erase, erasing),
        "erase, backward": (with_gradient(erased_from_maps), erasing_maps),
        "random_walk": (ops.random_walk, walked),
        "pair_offsets": (ops.pair_offsets, lambda d: ([d.pick(2, 3, 5, 10, 16)], {})),
        "ribfast::path_affinity": (raw.path_affinity, paths),
        "ribfast::pair_losses": (raw.pair_losses, pairs_of_labels),
        "ribfast::path_affinity_backward": (raw.path_affinity_backward, paths_backward),
        "ribfast::pair_losses_backward": (
            raw.pair_losses_backward,
            lambda d: ([d.floats(8), *pairs_of_labels(d)[0]], {}),
        ),
        "ribfast::pixel_losses": (raw.pixel_losses, lambda d: ([*pixels(d)], {})),
        "ribfast::pixel_loss_sums": (raw.pixel_loss_sums, pixel_loss_sums),
        "ribfast::pixel_loss_sums_backward": (
            raw.pixel_loss_sums_backward,
            lambda d: ([d.floats(4, dtype=torch.float64), *pixel_loss_sums(d)[0]], {}),
        ),
        "ribfast::erase": (raw.erase, erasing_raw),
        "ribfast::erase_backward": (raw.erase_backward, erasing_backward),
        "ribfast::random_walk": (raw.random_walk, walked_raw),
        "ribfast::gndrp": (raw.gndrp, lambda d: ([*pooled(d)[0], d.number(0.5), d.chance(0.5), d.chance(0.5)], {})),
        "ribfast::gndrp_backward": (raw.gndrp_backward, pooled_raw_backward),
        "ribfast::accumulate_cams": (raw.accumulate_cams, merged_raw),
        "ribfast::accumulate_cams_": (raw.accumulate_cams_, merged_raw_into),
        "ribfast::accumulate_cams_backward": (raw.accumulate_cams_backward, merged_raw_into),
        "ribfast::normalize_cams": (raw.normalize_cams, lambda d: ([*normalised(d)[0], d.number(1e-5)], {})),
        "ribfast::normalize_cams_": (raw.normalize_cams_, lambda d: ([*normalised(d)[0], d.number(1e-5)], {})),
        "ribfast::threshold_histogram": (raw.threshold_histogram, counted_raw),
        "ribfast::confusion_matrix": (raw.confusion_matrix, compared),
        "ribfast::activate_": (raw.activate_, activation),
        "ribfast::activate_backward": (raw.activate_backward, activation_backward),
        "ribfast::update_folded_": (raw.update_folded_, folded_update),
        "ribfast::dense_crf": (raw.dense_crf, fields_raw),
        "ribfast::dense_crf_labels": (raw.dense_crf_labels, label_fields_raw),
        "ribfast::refine": (raw.refine, refined_raw),
        "ribfast::lattice": (raw.lattice, lambda d: ([lattice_and_values(d)[0][0], d.chance(0.5)], {})),
        "ribfast::lattice_filter": (
            filtered_raw,
            lambda d: (lattice_and_values(d)[0], dict(spoil=d.pick(None, *range(99)))),
        ),
        "ribfast::mean_field": (field_over_lattices_raw, lattices_of_field),
    }


def described(value):
    if isinstance(value, torch.Tensor):
        strides = value.stride() if value.layout == torch.strided else value.layout
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} {strides}"
    if isinstance(value, dict):
        return ", ".join(f"{name}={described(v)}" for name, v in value.items())
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(described, value))}]"
    return repr(value)


def child(seed, first, calls, log):
    """Makes the calls; the log's last line is the call that is being made."""
    if not Path(_ext._C.__file__).is_relative_to(Path(log).parent):
        sys.exit(f"fuzz: expected the instrumented extension, got {_ext._C.__file__}")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory with NaN
    table = rows()
    outcomes = collections.Counter()
    strange = 0
    with open(log, "w") as lines:
        for number in range(first, first + calls):
            d = Draw([seed, number])
            name = list(table)[number % len(table)]
            function, arguments_of = table[name]
            positional, named = arguments_of(d)
            valid = d.chance(0.6)
            for _ in range(0 if valid else d.pick(1, 1, 2)):
                keys = [*range(len(positional)), *named]
                key = keys[d.random.integers(len(keys))]
                where = positional if isinstance(key, int) else named
                where[key] = d.wrong(where[key])
            call = f"{number} {name}({described(positional)} {described(named)})"
            lines.write(call + "\n")
            lines.flush()
            try:
                function(*positional, **named)
                outcomes["answered"] += 1
            except REFUSALS as error:
                outcomes["valid but refused" if valid else "refused"] += 1
                if "internal assert" in str(error).lower():
                    strange += 1
                    print(f"call {call}\n  {error}", flush=True)
            except Exception as error:
                strange += 1
                print(f"call {call}\n  {type(error).__name__}: {error}", flush=True)
    print(", ".join(f"{count} {what}" for what, count in sorted(outcomes.items())), flush=True)
    return 1 if strange else 0


def library(name):
    compiler = os.environ.get("CXX", "g++")
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        sys.exit(f"fuzz: expected {compiler} with {name}, got none; install gcc and its sanitizers' libraries")
    return found


def build(folder):
    """A copy of the package with an instrumented extension, in `folder`."""
    package = folder / "ribfast"
    shutil.copytree(ROOT / "ribfast", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"), dirs_exist_ok=True)
    environment = os.environ | {"RIBFAST_SANITIZE": "1", "RIBFAST_CUDA": "0"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    command += ["--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if built.returncode:
        sys.exit(f"fuzz: the build failed\n{built.stdout[-3000:]}{built.stderr[-3000:]}")


def tiers():
    """The CPU tiers that this machine has, the lowest first."""
    ladder = ["default", "avx2", "avx512"]
    best = torch.backends.cpu.get_cpu_capability().lower()
    return ladder[: ladder.index(best) + 1] if best in ladder else ["default"]


def parent(arguments):
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    print(f"fuzz: --seed {seed} --calls {arguments.calls}", flush=True)
    start = time.monotonic()
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.build or temporary).resolve()
        build(folder)
        # the program itself is not instrumented: the runtime comes first, and C++'s, whose exceptions it intercepts
        preloaded = " ".join(library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so"))
        environment = os.environ | OPTIONS | {"LD_PRELOAD": preloaded, "PYTHONPATH": str(folder)}
        ladder = [arguments.tier] if arguments.tier else tiers()
        first = arguments.first
        for place, tier in enumerate(ladder):
            calls = arguments.calls // len(ladder) + (place < arguments.calls % len(ladder))
            log = folder / "calls.log"
            command = [sys.executable, str(Path(__file__).resolve()), "--child", str(log)]
            command += ["--seed", str(seed), "--first", str(first), "--calls", str(calls)]
            done = subprocess.run(
                command, env=environment | {"ATEN_CPU_CAPABILITY": tier}, cwd=folder, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            undefined = "runtime error:" in done.stdout
            if done.returncode or undefined:
                failed.append(tier)
                last = log.read_text().splitlines()[-1:] if log.exists() else ["none"]
                print(done.stdout[:20000])
                print(f"fuzz: {tier}: exit {done.returncode}, last call {last[0]}")
            else:
                print(f"fuzz: {tier}: {done.stdout.strip().splitlines()[-1]}", flush=True)
            first += calls
    verdict = f"FAILED in {', '.join(failed)}" if failed else "no error"
    print(f"fuzz: {verdict} in {arguments.calls} calls of {len(rows())} operators and schemas, seed {seed}, "
          f"{time.monotonic() - start:.0f} s")  # fmt: skip
    return 1 if failed else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, help="repeats a run; drawn and printed otherwise")
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--tier", choices=("default", "avx2", "avx512"), help="one CPU tier (default: each in turn)")
    parser.add_argument("--build", help="folder to build in and keep, for quick repeats (default: a temporary one)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.seed, arguments.first, arguments.calls, arguments.child)
    return parent(arguments)


if __name__ == "__main__":
    sys.exit(main())
