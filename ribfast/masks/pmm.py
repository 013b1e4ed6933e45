"""Pseudo-mask Matters (ICCV 2021): an image's class maps -> its label map."""

import operator
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..ops import contract
from .labels import MOST_CLASS

LEAST_PROBABILITY = 1e-5  # of an energy, as pydensecrf's unary_from_softmax clips


def smooth_by_variation(maps: Tensor, *, threshold: float = 0.05, scale: float = 0.3) -> Tensor:
    """Class maps v (..., H, W) in [0, 1], each raised by its coefficient of variation: v^(1 - cv), float32.

    cv = scale * standard deviation (the population's) / mean of the values above the threshold, at most 1; 0 where
    there are none. Values below the threshold become 0.
    """
    op = "smooth_by_variation"
    contract.tensor(op, "maps", maps, shape="(..., H, W)")
    if maps.ndim < 2:
        raise ValueError(f"{op}: expected maps (..., H, W), got shape {tuple(maps.shape)}")
    contract.positions(op, "maps", maps)
    threshold = contract.number(op, "threshold", threshold, at_least=0)
    scale = contract.number(op, "scale", scale, at_least=0)
    values, places = maps.float(), (-2, -1)
    above = values > threshold
    count = above.sum(places, keepdim=True).clamp(min=1)
    mean = torch.where(above, values, 0).sum(places, keepdim=True) / count
    variance = torch.where(above, values - mean, 0).square().sum(places, keepdim=True) / count
    varied = variance > 0
    # what is not chosen is finite too, and so are gradients
    cv = torch.where(varied, scale * torch.where(varied, variance, 1).sqrt() / torch.where(varied, mean, 1), 0)
    low = (values < threshold) | (values == 0)  # 0 stays 0 where the exponent is 0
    return torch.where(low, 0, torch.where(low, 1, values) ** (1 - cv.clamp(max=1)))


@torch.no_grad()
def ppmg(
    image: Tensor | np.ndarray,
    cams: Mapping[int, Tensor | np.ndarray],
    *,
    power: float = 11,
    threshold: float = 0.05,
    cv_scale: float = 0.3,
    gaussian: tuple[float, float] | None = (3.0, 10.0),
    bilateral: tuple[float, float, float] | None = (80.0, 13.0, 10.0),
    iterations: int = 10,
    exact: bool = False,
) -> Tensor:
    """Proportional pseudo-mask generation: (H, W) uint8 labels on the image's device, 0 background, class + 1.

    image: (H, W, 3) uint8 RGB; cams: class (from 0) -> (H, W) in [0, 1]; both tensors or numpy arrays. For each class a
    CRF of two labels, with probabilities v' of `smooth_by_variation` and (1 - v')^power, says where its foreground is.
    A pixel gets that class of those in whose foreground it lies whose v / (1 + sum of v over its foreground) is
    largest: of two classes the smaller one wins. All CRFs share one lattice.

    The CRF sees B, G, R, as in the released code: the lattice's axes have an order, and R, G, B would change up to
    0.5 % of the labels. gaussian, bilateral, iterations, exact: as for `ops.dense_crf`.
    """
    op = "ppmg"
    image = _image(op, image)
    power = contract.number(op, "power", power, at_least=0)
    classes, maps = _maps(op, image, cams)
    smooth = smooth_by_variation(maps, threshold=threshold, scale=cv_scale)
    probabilities = torch.stack([(1 - smooth) ** power, smooth], 1)
    energies = probabilities.clamp_(LEAST_PROBABILITY, 1).log_().neg_()
    terms = dict(gaussian=gaussian, bilateral=bilateral, iterations=iterations, exact=exact)
    (q,) = ops.dense_crf([image.flip(-1)], [energies], **terms)
    if not classes:
        return torch.zeros(image.shape[:2], dtype=torch.uint8, device=image.device)
    foreground = q[:, 1] > 0.5
    size = torch.where(foreground, maps, 0).sum((1, 2), keepdim=True)
    importance, at = torch.where(foreground, maps / (1 + size), -1).max(0)
    labels = torch.tensor(classes, dtype=torch.uint8, device=image.device) + 1
    return torch.where(importance < 0, 0, labels[at])


def _image(op: str, image) -> Tensor:
    if isinstance(image, np.ndarray):
        image = _from_numpy(image) if image.dtype == np.uint8 else image
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        got = getattr(image, "dtype", None) or type(image).__name__
        raise TypeError(f"{op}: expected image to be a uint8 tensor or array (H, W, 3), got {got}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"{op}: expected image (H, W, 3) with at least one pixel, got shape {tuple(image.shape)}")
    return image


def _maps(op: str, image: Tensor, cams) -> tuple[list[int], Tensor]:
    """The classes, ascending, and their maps (K, H, W) in float32, checked."""
    if not isinstance(cams, Mapping):
        raise TypeError(f"{op}: expected cams to be a dict of class -> (H, W), got {type(cams).__name__}")
    by_class = {}
    for key, values in cams.items():
        if isinstance(key, (bool, np.bool_)) or not hasattr(key, "__index__"):
            raise TypeError(f"{op}: expected integer classes, got {key!r}")
        by_class[operator.index(key)] = values
    maps = torch.empty(len(by_class), *image.shape[:2], device=image.device)
    for out, (key, values) in zip(maps, sorted(by_class.items()), strict=True):
        contract.integer(op, "classes", key, 0, MOST_CLASS)
        if isinstance(values, np.ndarray) and values.dtype.kind == "f":
            values = _from_numpy(values).to(image.device)
        contract.tensor(op, f"the map of class {key}", values, shape="(H, W)")
        if values.shape != out.shape:
            raise ValueError(f"{op}: expected the map of class {key} to have the image's size {tuple(out.shape)}, "
                             f"got shape {tuple(values.shape)}")  # fmt: skip
        contract.same_device(op, image, values)
        out.copy_(values)
    classes = sorted(by_class)
    if classes:
        low, high = torch.stack(maps.flatten(1).aminmax(dim=1)).tolist()
        for key, least, most in zip(classes, low, high, strict=True):
            if not (least >= 0 and most <= 1):
                raise ValueError(f"{op}: expected maps within [0, 1], got {least:g} to {most:g} in that of class "
                                 f"{key}; divide it by its maximum")  # fmt: skip
    return classes, maps


def _from_numpy(array: np.ndarray) -> Tensor:
    """A copy: arrays may be read-only, or strided backwards."""
    return torch.from_numpy(np.array(array, order="C"))
