"""Merging the maps of scales and mirrored views: wrapper, contract, fake kernels, autograd, autocast."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ext, reference
from . import contract
from .registration import call_in_backward, refuse_gradient, run_under_autocast

_OP = "accumulate_cams"


def accumulate_cams(
    maps: Sequence[Tensor],
    size: tuple[int, int],
    *,
    padded: tuple[int, int] | None = None,
    relu: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Sum class maps over scales and mirrored views at the image's size, in one pass over the output.

    maps: one (V, C, h, w) per scale, V = 1 or 2, index 1 being the map of the mirrored image.
    Returns (C, H, W) in float32 (float64 for float64 maps): the maps rectified, the mirrored ones turned back,
    enlarged (bilinear, align_corners=False) to `padded` (default `size`), cut to `size` at the top left and summed.
    `out` is added into, and returned.
    """
    size = contract.size(_OP, "size", size)
    return accumulate_cams_batch(
        [maps], [size], padded=None if padded is None else [padded], relu=relu, out=None if out is None else [out]
    )[0]


def accumulate_cams_batch(
    maps: Sequence[Sequence[Tensor]],
    sizes: Sequence[tuple[int, int]],
    *,
    padded: Sequence[tuple[int, int]] | None = None,
    relu: bool = True,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """`accumulate_cams` for many images, of different sizes and numbers of scales if need be, in one launch.

    maps: the maps of each image; sizes, padded, out: one for each image. Returns a tensor for each.
    """
    maps = [_scales(image) for image in maps]
    sizes, padded = _sizes(sizes, padded, len(maps))
    flat = list(itertools.chain.from_iterable(maps))
    if not flat:
        return []
    if any(t.dtype != flat[0].dtype for t in flat) and not _autocast(flat[0].device.type):
        raise TypeError(f"{_OP}: expected maps of one dtype, got {' and '.join(sorted({str(t.dtype) for t in flat}))}")
    contract.same_device(_OP, *flat)
    if out is not None:
        out = list(out)
        _check_out(out, maps, sizes)
    if _ext.backend(_OP, flat[0].device).name == "reference":
        targets = out or itertools.repeat(None)
        each = zip(maps, sizes, padded, targets, strict=False)
        return [reference.accumulate_cams(m, s, padded=p, relu=relu, out=o) for m, s, p, o in each]
    counts = [len(image) for image in maps]
    flat_sizes, flat_padded = [*itertools.chain(*sizes)], [*itertools.chain(*padded)]
    if out is None:
        return torch.ops.ribfast.accumulate_cams(flat, counts, flat_sizes, flat_padded, bool(relu))
    if torch.is_grad_enabled() and any(t.requires_grad for t in flat + out):
        sums = torch.ops.ribfast.accumulate_cams(flat, counts, flat_sizes, flat_padded, bool(relu))
        return [target.add_(total) for target, total in zip(out, sums, strict=True)]
    torch.ops.ribfast.accumulate_cams_(out, flat, counts, flat_padded, bool(relu))
    return out


def _autocast(device: str) -> bool:
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def _scales(maps) -> list[Tensor]:
    """One image's maps, checked."""
    if isinstance(maps, Tensor) or not hasattr(maps, "__iter__"):
        raise TypeError(f"{_OP}: expected a sequence of maps, one (V, C, h, w) for each scale, "
                        f"got {type(maps).__name__}")  # fmt: skip
    maps = list(maps)
    if not maps:
        raise ValueError(f"{_OP}: expected at least one scale, got an empty sequence")
    for scale in maps:
        contract.tensor(_OP, "each scale's maps", scale, 4, "(V, C, h, w)")
        contract.positions(_OP, "each scale's maps", scale)
        if scale.shape[0] not in (1, 2):
            raise ValueError(f"{_OP}: expected 1 or 2 views (the image, its mirror), got shape {tuple(scale.shape)}")
        if scale.shape[1] != maps[0].shape[1]:
            raise ValueError(f"{_OP}: expected the same number of classes at every scale, "
                             f"got {maps[0].shape[1]} and {scale.shape[1]}")  # fmt: skip
    return maps


def _sizes(sizes, padded, images: int):
    sizes = [contract.size(_OP, "size", size) for size in sizes]
    if len(sizes) != images:
        raise ValueError(f"{_OP}: expected a size for each of {images} images, got {len(sizes)}")
    if padded is None:
        return sizes, sizes
    padded = [contract.size(_OP, "padded", size) for size in padded]
    if len(padded) != images:
        raise ValueError(f"{_OP}: expected a padded size for each of {images} images, got {len(padded)}")
    for size, large in zip(sizes, padded, strict=True):
        if large[0] < size[0] or large[1] < size[1]:
            raise ValueError(f"{_OP}: expected padded of at least the size {size}, got {large}")
    return sizes, padded


def _check_out(out: list, maps: list[list[Tensor]], sizes) -> None:
    if len(out) != len(maps):
        raise ValueError(f"{_OP}: expected an out for each of {len(maps)} images, got {len(out)}")
    for target, image, size in zip(out, maps, sizes, strict=True):
        contract.tensor(_OP, "out", target, 3, "(C, H, W)")
        if target.shape != (image[0].shape[1], *size):
            raise ValueError(f"{_OP}: expected out of shape {(image[0].shape[1], *size)}, got {tuple(target.shape)}")
        if target.dtype != reference.accumulator_dtype(image[0].dtype):
            raise TypeError(f"{_OP}: expected out in {reference.accumulator_dtype(image[0].dtype)}, got {target.dtype}")
        contract.same_device(_OP, image[0], target)


@torch.library.register_fake("ribfast::accumulate_cams")
def _(maps, counts, sizes, padded, relu):
    firsts = [maps[start] for start in itertools.accumulate([0, *counts[:-1]])]
    return [
        first.new_empty((first.shape[1], *sizes[2 * i : 2 * i + 2]), dtype=reference.accumulator_dtype(first.dtype))
        for i, first in enumerate(firsts)
    ]


@torch.library.register_fake("ribfast::accumulate_cams_")
def _(out, maps, counts, padded, relu):
    return None


@torch.library.register_fake("ribfast::accumulate_cams_backward")
def _(grads, maps, counts, padded, relu):
    return [scale.new_empty(scale.shape) for scale in maps]


def _save(ctx, inputs, output):
    maps, ctx.counts, ctx.sizes, ctx.padded, ctx.relu = inputs
    ctx.save_for_backward(*maps)


def _backward(ctx, grads):
    maps = ctx.saved_tensors
    starts = itertools.accumulate([0, *ctx.counts[:-1]])
    grads = [
        maps[start].new_zeros(
            (maps[start].shape[1], *ctx.sizes[2 * i : 2 * i + 2]), dtype=reference.accumulator_dtype(maps[start].dtype)
        )
        if grads[i] is None
        else grads[i]
        for i, start in enumerate(starts)
    ]
    backward = torch.ops.ribfast.accumulate_cams_backward.default
    grad_maps = call_in_backward(backward, grads, maps, ctx.counts, ctx.padded, ctx.relu)
    return grad_maps, None, None, None, None


def _save_backward(ctx, inputs, output):
    grads, maps, ctx.counts, ctx.padded, ctx.relu = inputs
    ctx.sizes = [side for grad in grads for side in grad.shape[1:]]
    ctx.save_for_backward(*maps)


def _backward_of_backward(ctx, grads):
    maps = ctx.saved_tensors
    passed = [
        torch.zeros_like(scale) if grad is None else torch.where(scale <= 0, 0, grad) if ctx.relu else grad
        for scale, grad in zip(maps, grads, strict=True)
    ]
    merged = torch.ops.ribfast.accumulate_cams(passed, ctx.counts, ctx.sizes, ctx.padded, False)
    return merged, [None] * len(maps), None, None, None


def _promote(op, *args):
    """Autocast's rule: 16-bit maps are read as they are; where scales differ in dtype, all become float32."""
    args = list(args)
    at = len(args) - (5 if op is torch.ops.ribfast.accumulate_cams.default else 4)  # maps come first, or after `out`
    if len({scale.dtype for scale in args[at]}) > 1:
        wide = max((reference.accumulator_dtype(scale.dtype) for scale in args[at]), key=lambda d: d.itemsize)
        args[at] = [scale.to(wide) for scale in args[at]]
    return op(*args)


torch.library.register_autograd("ribfast::accumulate_cams", _backward, setup_context=_save)
torch.library.register_autograd(
    "ribfast::accumulate_cams_backward", _backward_of_backward, setup_context=_save_backward
)
refuse_gradient("accumulate_cams_", "accumulate_cams(..., out=) of the Python package has one")
run_under_autocast("accumulate_cams", _promote)
run_under_autocast("accumulate_cams_", _promote)
