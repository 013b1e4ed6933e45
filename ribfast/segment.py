"""From photographs to the probabilities of every pixel's label: a segmenter at several scales, mirrored, in windows."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import data
from .cams import crop_origins, cut_crops, merge_crops

TOGETHER = 1 << 22  # pixels that go through the network at once


def label_probabilities(
    model,
    images: Sequence[np.ndarray],
    *,
    scales: Sequence[float] = (1.0,),
    mirror: bool = True,
    window: int = 0,
    stride: int = 0,
) -> list[Tensor]:
    """(n_classes + 1, H, W) float32 of each image, on the model's device: the mean over scales and mirrors.

    model: a models.Segmenter, in evaluation; images: (H, W, 3) uint8 RGB of any sizes; those that are of one size are
    computed together. Logits are enlarged (bilinear, align_corners=False) to the image's size first. window: scales are
    computed in overlapping windows of this side, one every `stride` pixels (0: two thirds of a window), whose logits
    are averaged where they overlap; a scale that is smaller is padded with zeros, once it is normalised. 0: whole. The
    caller's autocast applies.
    """
    op, stride = "label_probabilities", stride or max(1, window * 2 // 3)
    if not scales:
        raise ValueError(f"{op}: expected at least one scale, got none")
    if window and not 0 < stride <= window:
        raise ValueError(f"{op}: expected 0 < stride <= window, got stride {stride} and window {window}")
    device, n_labels = next(model.parameters()).device, model.n_classes + 1
    normalization = data.NORMALIZATIONS[model.normalization]
    sums = [torch.zeros(n_labels, *image.shape[:2], device=device) for image in images]
    with torch.inference_mode():
        for scale in scales:
            sizes: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
            for number, image in enumerate(images):
                (view,) = data.make_views(image, (scale,), normalization, mirror=mirror)
                if window:
                    _add_windows(model, view.to(device), window, stride, sums[number])
                else:
                    sizes.setdefault(tuple(view.shape[2:]), []).append((number, view))
            for (height, width), group in sizes.items():
                count = max(1, TOGETHER // (height * width * (1 + mirror)))
                for begin in range(0, len(group), count):
                    _add_whole(model, group[begin : begin + count], sums)
        for total in sums:
            total.div_(len(scales) * (1 + mirror))
    return sums


def _add_whole(model, group: list[tuple[int, Tensor]], sums: list[Tensor]) -> None:
    """Views of one size, with their images' numbers."""
    numbers, views = zip(*group, strict=True)
    logits = _logits(model, torch.cat(views).to(sums[0].device)).unflatten(0, (len(group), -1))
    for number, pair in zip(numbers, logits, strict=True):
        for which, own in enumerate(pair):
            enlarged = F.interpolate(
                (own.flip(-1) if which else own)[None],
                size=sums[number].shape[1:],
                mode="bilinear",
                align_corners=False,
            )[0]
            sums[number].add_(enlarged.softmax(0))


def _logits(model, images: Tensor) -> Tensor:
    return model(images.contiguous(memory_format=torch.channels_last))[0].float()


def _add_windows(model, views: Tensor, window: int, stride: int, out: Tensor) -> None:
    size = views.shape[2:]
    rows, columns = (crop_origins(side, window, stride) for side in size)
    places = [(y, x) for y in rows for x in columns]
    count = max(1, TOGETHER // (window * window))
    for which, view in enumerate(views):
        parts = []
        for begin in range(0, len(places), count):
            some = [(view, y, x) for y, x in places[begin : begin + count]]
            parts.append(_logits(model, cut_crops(some, window)))
        logits = merge_crops(torch.cat(parts), rows, columns, window, size, torch.zeros_like(out), relu=False)
        out.add_((logits.flip(-1) if which else logits).softmax(0))
