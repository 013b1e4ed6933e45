"""Every way from an image's class maps to its mask, behind one configuration."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..models import IRNet
from .irn import WalkConfig, boundaries, walk_labels
from .labels import LabelConfig, check_keys, confident_labels
from .pmm import ppmg

Pixels = tuple[float, float] | None
Colours = tuple[float, float, float] | None


@dataclass(frozen=True)
class MaskConfig:
    """The presets set the constants that each method was published with; a method reads what is its own."""

    method: Literal["threshold", "crf", "labels", "irn", "ppmg", "par", "pamr"] = "crf"  # how a mask is made
    # of threshold, crf, irn, par, pamr: background where no map, of 0 to 1, is above this; of labels: sure of it then
    background: float = 0.25
    foreground: float = 0.30  # of labels: a class where its map is above this; unknown (255) between the two
    confidence: float = 0.7  # of crf and labels: the CRF's in the labels that it is given
    gaussian: Pixels = (3.0, 3.0)  # of crf, labels and ppmg: the CRF's pixels, strength
    bilateral: Colours = (50.0, 5.0, 10.0)  # of crf, labels and ppmg: pixels, colours, strength
    iterations: int = 10  # of crf, labels, ppmg, par and pamr
    power: float = 1.0  # of irn: maps are raised to it before they walk; of ppmg: the background is (1 - map) to it
    beta: float = 10.0  # of irn: affinities of pixels are raised to it
    log2_steps: int = 8  # of irn: 2 ** this many steps
    radius: int = 5  # of irn: a step leads to pixels, of a quarter of the image's, that are closer than this
    # of irn: photographs are padded with zeros up to this side for its network; none: to its crops' in training
    padded: int | None = None
    least: float = 0.05  # of ppmg: values below it count as 0
    cv_scale: float = 0.3  # of ppmg: how much a map's coefficient of variation smoothes it
    dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)  # of par and pamr: distances of the neighbours

    def __post_init__(self):
        within = {"background": 0 <= self.background < 1, "foreground": 0 <= self.foreground < 1,
                  "confidence": 0 < self.confidence < 1, "least": 0 <= self.least <= 1}  # fmt: skip
        least = {"power": 0, "cv_scale": 0, "iterations": 0}
        for name, right in within.items():
            if not right:
                raise ValueError(f"MaskConfig: expected {name} between 0 and 1, got {getattr(self, name)}")
        for name, bound in least.items():
            if not bound <= getattr(self, name) < math.inf:
                raise ValueError(f"MaskConfig: expected {name} of at least {bound}, got {getattr(self, name)}")
        for name in ("gaussian", "bilateral"):
            term = getattr(self, name)
            if term is not None and not (all(map(math.isfinite, term)) and min(term[:-1]) > 0):
                raise ValueError(f"MaskConfig: expected {name} with standard deviations above 0, got {term}")
        if not 1 <= len(self.dilations) <= 16 or min(self.dilations) < 1:
            raise ValueError(f"MaskConfig: expected 1 to 16 dilations of at least 1, got {self.dilations}")
        self._walk()
        if self.method == "labels":
            self._labels()

    def _labels(self) -> LabelConfig:
        return LabelConfig(self.foreground, self.background, self.confidence, self.gaussian, self.bilateral,
                           self.iterations)  # fmt: skip

    def _walk(self) -> WalkConfig:
        return WalkConfig(self.background, self.power, self.beta, self.log2_steps, self.radius, self.padded)

    @classmethod
    def crf(cls) -> "MaskConfig":
        return cls()

    @classmethod
    def threshold(cls) -> "MaskConfig":
        return cls(method="threshold")

    @classmethod
    def labels(cls) -> "MaskConfig":
        """What IRN's network is trained on."""
        return cls(method="labels", background=0.05, foreground=0.30)

    @classmethod
    def rib_labels(cls) -> "MaskConfig":
        return cls(method="labels", background=0.17, foreground=0.35)

    @classmethod
    def irn(cls) -> "MaskConfig":
        return cls(method="irn", **WalkConfig.irn().options())

    @classmethod
    def rib(cls) -> "MaskConfig":
        return cls(method="irn", **WalkConfig.rib().options())

    @classmethod
    def coco(cls) -> "MaskConfig":
        return cls(method="irn", **WalkConfig.coco().options())

    @classmethod
    def ppmg(cls) -> "MaskConfig":
        return cls(method="ppmg", power=11.0, gaussian=(3.0, 10.0), bilateral=(80.0, 13.0, 10.0))

    @classmethod
    def par(cls) -> "MaskConfig":
        return cls(method="par")

    @classmethod
    def pamr(cls) -> "MaskConfig":
        return cls(method="pamr")


@torch.no_grad()
def make_masks(
    images: Sequence[np.ndarray],
    cams: Sequence[Tensor | None],
    maps: Sequence[Tensor | None],
    keys: Sequence[Sequence[int]],
    config: MaskConfig,
    network: IRNet | None = None,
) -> list[Tensor]:
    """(H, W) uint8 labels of each image, on its maps' device: 0 background, class + 1, 255 unknown (of labels alone).

    images: (H, W, 3) uint8 RGB; cams: (n, ceil(H / 4), ceil(W / 4)), which irn walks, and maps: (n, H, W), which the
    others read, both in [0, 1]; keys: their n classes from 0. network: IRN's, for irn.
    """
    op, method = "make_masks", config.method
    for own, given in zip(keys, cams if method == "irn" else maps, strict=True):
        check_keys(op, torch.tensor(own, dtype=torch.long), given)
    if method == "irn":
        if network is None:
            raise ValueError(f"{op}: expected IRN's network for method irn, got none; train it first (train-irn)")
        edges = boundaries(network, list(images), padded=config.padded)
        sizes = [image.shape[:2] for image in images]
        options = {name: value for name, value in dataclasses.asdict(config._walk()).items() if name != "padded"}
        return walk_labels(list(cams), list(keys), [e.to(c.device) for e, c in zip(edges, cams, strict=True)], sizes,
                           **options)  # fmt: skip
    pictures = [torch.from_numpy(image).to(own.device) for image, own in zip(images, maps, strict=True)]
    if method == "labels":
        return confident_labels(pictures, list(maps), list(keys), **config._labels().options())
    if method == "ppmg":
        return [_ppmg(*each, config) for each in zip(pictures, maps, keys, strict=True)]
    classes = [torch.tensor([0, *(key + 1 for key in own)], dtype=torch.uint8) for own in keys]
    if method in ("par", "pamr"):
        given = [torch.cat([own.new_full((1, *own.shape[1:]), config.background), own]) for own in maps]
        channels = [picture.permute(2, 0, 1) for picture in pictures]
        given = ops.refine(channels, given, method=method, dilations=config.dilations, iterations=config.iterations)
        return [names.to(own.device)[own.argmax(0)] for own, names in zip(given, classes, strict=True)]
    chosen = [_above(own, config.background) for own in maps]
    if method == "crf":
        chosen = _crf(pictures, chosen, [len(own) for own in keys], config)
    return [names.to(own.device)[own.int()] for own, names in zip(chosen, classes, strict=True)]


def _above(maps: Tensor, background: float) -> Tensor:
    """1 + the number of the largest map where that is above the background, else 0."""
    if not len(maps):
        return torch.zeros(maps.shape[1:], dtype=torch.uint8, device=maps.device)
    largest, number = maps.max(0)
    return torch.where(largest > background, number + 1, 0).to(torch.uint8)


def _crf(pictures: list[Tensor], labels: list[Tensor], counts: list[int], config: MaskConfig) -> list[Tensor]:
    """Images of one number of classes together; where there is no class there is nothing to be refined."""
    terms = dict(confidence=config.confidence, gaussian=config.gaussian, bilateral=config.bilateral)
    results = list(labels)
    for count in sorted({*counts} - {0}):
        numbers = [number for number, own in enumerate(counts) if own == count]
        found = ops.dense_crf_labels([pictures[n] for n in numbers], [labels[n] for n in numbers], count + 1,
                                     iterations=config.iterations, **terms)  # fmt: skip
        for number, own in zip(numbers, found, strict=True):
            results[number] = own
    return results


def _ppmg(picture: Tensor, maps: Tensor, keys: Sequence[int], config: MaskConfig) -> Tensor:
    return ppmg(picture, dict(zip(keys, maps.clamp(0, 1), strict=True)), power=config.power, threshold=config.least,
                cv_scale=config.cv_scale, gaussian=config.gaussian, bilateral=config.bilateral,
                iterations=config.iterations)  # fmt: skip
