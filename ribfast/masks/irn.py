"""IRN's walk: class maps spread up to the class boundaries that its network sees, and the labels that they make."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .. import data, ops
from ..models import IRNet
from ..ops import contract
from .labels import check_keys

STRIDE = 4  # of boundaries and of the maps that walk


@dataclass(frozen=True)
class WalkConfig:
    """The defaults are IRN's."""

    background: float = 0.25  # a pixel is background where no walked map is above this share of the largest value
    power: float = 1.0  # class maps, of 0 to 1, are raised to it before
    beta: float = 10.0  # affinities of pixels, of 0 to 1, are raised to it
    log2_steps: int = 8  # 2 ** this many steps
    radius: int = 5  # a step leads to pixels, of a quarter of the image's, that are closer than this
    # the network sees photographs padded with zeros up to this side, for GroupNorm; none: to its crops' in training
    padded: int | None = None

    def __post_init__(self):
        for name in ("background", "power", "beta", "padded"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"WalkConfig: expected {name} of at least 0, got {value}")
        if self.beta == 0:
            raise ValueError("WalkConfig: expected beta above 0, got 0; every pair would be alike")
        if not 0 <= self.log2_steps <= 16:
            raise ValueError(f"WalkConfig: expected log2_steps from 0 to 16, got {self.log2_steps}")
        ops.pair_offsets(self.radius)

    def options(self) -> dict:
        """The keywords of `walk_labels`."""
        names = [field.name for field in dataclasses.fields(WalkConfig) if field.name != "padded"]
        return {name: getattr(self, name) for name in names}

    @classmethod
    def irn(cls) -> "WalkConfig":
        return cls()

    @classmethod
    def rib(cls) -> "WalkConfig":
        return cls(background=0.27, power=1.3)

    @classmethod
    def coco(cls) -> "WalkConfig":
        return cls(background=0.22, power=1.3)


@torch.no_grad()
def boundaries(
    model: IRNet, images: np.ndarray | Tensor | Sequence, *, padded: int | None = None, precision: str = "float32"
) -> Tensor | list[Tensor]:
    """The class boundary of an image, (ceil(H / 4), ceil(W / 4)) in [0, 1], from it and its mirror; or a list's.

    images: (H, W, 3) uint8 arrays, or their views (2, 3, H, W) as data.make_views makes them; those that have one size
    once they are `padded` (see IRNet.boundaries) are computed together. precision: float32 or bfloat16.
    """
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"boundaries: expected precision of float32 or bfloat16, got {precision!r}")
    single, device = isinstance(images, (np.ndarray, Tensor)), next(model.parameters()).device
    normalization, views = data.NORMALIZATIONS[model.normalization], []
    for image in [images] if single else images:
        view = image if isinstance(image, Tensor) else data.make_views(image, (1.0,), normalization)[0]
        if view.ndim != 4 or view.shape[:2] != (2, 3) or not view.is_floating_point():
            raise ValueError(f"boundaries: expected uint8 arrays (H, W, 3), or views (2, 3, H, W) of make_views, got "
                             f"{view.dtype} {tuple(view.shape)}")  # fmt: skip
        views.append(view.to(device, non_blocking=True))
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        found = model.boundaries(views, padded)
    return found[0] if single else found


@torch.no_grad()
def walk_labels(
    cams: Tensor | Sequence[Tensor],
    keys: Tensor | Sequence,
    boundary: Tensor | Sequence[Tensor],
    size: tuple[int, int] | Sequence[tuple[int, int]],
    *,
    background: float = 0.25,
    power: float = 1.0,
    beta: float = 10.0,
    log2_steps: int = 8,
    radius: int = 5,
) -> Tensor | list[Tensor]:
    """(H, W) uint8 labels of class maps that walked up to the boundaries: 0 background, class + 1.

    cams: (n, ceil(H / 4), ceil(W / 4)) in [0, 1], keys: their n classes from 0, boundary: (ceil(H / 4), ceil(W / 4)),
    size: (H, W); or lists of these, whose images walk together -> a list.
    The cams to the power `power` walk (`ops.random_walk`: beta, log2_steps, radius), are enlarged bilinearly and
    divided by the largest value of all; the largest class wins that is above `background`.
    """
    op = "walk_labels"
    single = isinstance(cams, Tensor)
    if single:
        cams, keys, boundary, size = [cams], [keys], [boundary], [size]
    if not len(cams) == len(keys) == len(boundary) == len(size):
        raise ValueError(f"{op}: expected keys, a boundary and a size for each image, got {len(keys)}, {len(boundary)} "
                         f"and {len(size)} for {len(cams)}")  # fmt: skip
    contract.number(op, "background", background, at_least=0)
    contract.number(op, "power", power, at_least=0)
    sizes = [contract.size(op, "size", each) for each in size]
    classes = [_check(op, *each) for each in zip(cams, keys, boundary, sizes, strict=True)]
    walking = [number for number, own in enumerate(classes) if len(own)]
    raised = [cams[n].float() if power == 1 else cams[n].float() ** power for n in walking]
    options = dict(beta=beta, log2_steps=log2_steps, radius=radius)
    walked = dict(zip(walking, ops.random_walk(raised, [boundary[n] for n in walking], **options), strict=True))
    results = []
    for number, own in enumerate(classes):
        if number in walked:
            results.append(_labels(walked[number], own, sizes[number], background))
        else:
            results.append(torch.zeros(sizes[number], dtype=torch.uint8, device=boundary[number].device))
    return results[0] if single else results


def feature_affinity(features: Tensor, radius: int = 5) -> Tensor:
    """PSA's affinities of pixels by their features (K, h, w): exp(- the mean absolute difference), (P, h, w) float32 of
    `ops.pair_offsets(radius)`, 0 for neighbours outside; for ops.random_walk(cams, affinity=..., beta=8)."""
    contract.tensor("feature_affinity", "features", features, 3, "(K, h, w)")
    contract.positions("feature_affinity", "features", features)
    if not len(features):
        raise ValueError("feature_affinity: expected at least one feature, got none")
    features, offsets = features.float(), ops.pair_offsets(radius)
    height, width = features.shape[1:]
    result = features.new_zeros(len(offsets), height, width)
    for plane, (y, x) in zip(result, offsets, strict=True):
        if y < height and abs(x) < width:
            rows, columns = slice(0, height - y), slice(max(0, -x), width - max(0, x))
            there = features[:, y:, columns.start + x : columns.stop + x]
            plane[rows, columns] = (-(features[:, rows, columns] - there).abs().mean(0)).exp()
    return result


def _check(op: str, cams: Tensor, keys, boundary: Tensor, size: tuple[int, int]) -> Tensor:
    """The image's classes, on its cams' device."""
    contract.tensor(op, "cams", cams, 3, "(n, ceil(H / 4), ceil(W / 4))")
    contract.tensor(op, "boundary", boundary, 2, "(ceil(H / 4), ceil(W / 4))")
    classes, grid = torch.as_tensor(keys).to(cams.device), tuple(-(-side // STRIDE) for side in size)
    if classes.ndim != 1 or cams.shape != (len(classes), *grid) or boundary.shape != grid:
        raise ValueError(f"{op}: expected cams of {classes.numel()} keys and boundary with {grid[0]} x {grid[1]} "
                         f"positions for an image of {size[0]} x {size[1]} pixels, got shapes {tuple(cams.shape)} and "
                         f"{tuple(boundary.shape)}")  # fmt: skip
    if len(classes) and cams.min() < 0:  # a power of them would be none
        raise ValueError(f"{op}: expected cams in [0, 1], got {cams.min().item():g}")
    return check_keys(op, classes, cams)


def _labels(walked: Tensor, classes: Tensor, size: tuple[int, int], background: float) -> Tensor:
    large = F.interpolate(walked[None], scale_factor=STRIDE, mode="bilinear", align_corners=False)[0]
    values, number = large[:, : size[0], : size[1]].max(0)
    largest = values.max()
    values = values / torch.where(largest > 0, largest, 1)
    return torch.where(values > background, classes[number] + 1, 0).to(torch.uint8)
