"""Masks of a trained segmenter."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .. import data, models, ops
from ..processes import choose_device, choose_shard
from ..segment import label_probabilities
from ..store import Store
from .stage import Made, check_classes, label_all


@dataclass(frozen=True)
class PredictConfig:
    """The defaults are one pass over the photograph and one over its mirror."""

    scales: tuple[float, ...] = (1.0,)  # of the photograph; probabilities are averaged over them
    mirror: bool = True  # each scale's mirror too
    window: int = 0  # scales are computed in overlapping windows of this side; 0: whole
    stride: int = 0  # from one window to the next; 0: two thirds of a window
    crf: bool = False  # refine the probabilities by a dense CRF
    gaussian: tuple[float, float] | None = (1.0, 3.0)  # of crf: pixels, strength
    bilateral: tuple[float, float, float] | None = (67.0, 3.0, 4.0)  # of crf: pixels, colours, strength
    iterations: int = 10  # of crf
    known: bool = False  # no labels but background and the classes that the data names for the photograph
    # longer side of the largest photographs that are computed as they are; larger ones are reduced to it first, and
    # their masks enlarged; none: no bound
    largest: int | None = 1024
    precision: Literal["float32", "bfloat16"] = "float32"  # of the network; probabilities are float32
    batch: int = 4  # images at a time; those of one size go through the network together
    shard: str | None = None  # i/n: the i-th of n shares alone, from 0; none: all, with whoever shares OUT
    workers: int = 2  # threads that decode
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def __post_init__(self):
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"PredictConfig: expected scales above 0, got {self.scales}")
        if self.window < 0 or not 0 <= self.stride <= max(self.window, 0):
            raise ValueError(f"PredictConfig: expected a window of at least 0 and a stride of at most that, got "
                             f"{self.window} and {self.stride}")  # fmt: skip
        for name, least in {"batch": 1, "largest": 1, "workers": 0, "iterations": 0}.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"PredictConfig: expected {name} of at least {least}, got {getattr(self, name)}")
        choose_shard(self.shard)

    @classmethod
    def single(cls) -> "PredictConfig":
        return cls()

    @classmethod
    def multi(cls) -> "PredictConfig":
        """DeepLab's and PMM's tests: six scales, mirrors, CRF."""
        return cls(scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), crf=True)


def predict_masks(
    source: data.Source,
    model: models.Segmenter,
    store: Store,
    config: PredictConfig | None = None,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> Made:
    """A segmenter's mask of each image into the store. What is there already is left alone; an image that cannot be
    read is recorded as a failure and does not stop the others."""
    config = config or PredictConfig()
    check_classes("predict_masks", source, model)
    model = model.to(choose_device(config.device), memory_format=torch.channels_last).eval()

    def label(block: list[tuple]) -> list[Tensor]:
        return _predict(model, [image for _, image in block], [item.classes for item, _ in block], config)

    return label_all(source, store, config, source.image, label, progress, together=True)


def _predict(model, images: list[np.ndarray], classes: list[tuple[int, ...]], config: PredictConfig) -> list[Tensor]:
    """(H, W) uint8 of each."""
    device, sizes = next(model.parameters()).device, [image.shape[:2] for image in images]
    images = [data.reduce_to(image, config.largest) for image in images]
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        found = label_probabilities(model, images, scales=config.scales, mirror=config.mirror, window=config.window,
                                    stride=config.stride)  # fmt: skip
    names = None
    if config.known:
        names = [torch.tensor([0, *(key + 1 for key in present)], device=device) for present in classes]
        found = [own[allowed] for own, allowed in zip(found, names, strict=True)]
        found = [own / own.sum(0) for own in found]
    if config.crf:
        pictures = [torch.from_numpy(image).to(device) for image in images]
        energies = [own.clamp(min=1e-5).log_().neg_() for own in found]
        terms = dict(gaussian=config.gaussian, bilateral=config.bilateral, iterations=config.iterations)
        found = ops.dense_crf(pictures, energies, **terms)
    labels = [own.argmax(0) for own in found]
    if names is not None:
        labels = [allowed[own] for own, allowed in zip(labels, names, strict=True)]
    labels = [own.to(torch.uint8) for own in labels]
    return [own if own.shape == size else F.interpolate(own[None, None], size=size, mode="nearest-exact")[0, 0]
            for own, size in zip(labels, sizes, strict=True)]  # fmt: skip
