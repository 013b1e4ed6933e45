"""IRN's confident labels: what class maps and a CRF are sure of, for its network to train on."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..ops import contract

MOST_CLASS = 253  # labels are classes + 1 in uint8, and 255 is that of unknown pixels
UNKNOWN = 255


@dataclass(frozen=True)
class LabelConfig:
    """The defaults are IRN's."""

    foreground: float = 0.30  # a class is foreground where its map, of 0 to 1, is above this
    background: float = 0.05  # what is not above this is background; between the two, nothing is known
    confidence: float = 0.7  # of the CRF in the labels that it is given
    gaussian: tuple[float, float] | None = (3.0, 3.0)  # the CRF's: pixels, strength
    bilateral: tuple[float, float, float] | None = (50.0, 5.0, 10.0)  # pixels, colours, strength
    iterations: int = 10  # of the CRF

    def __post_init__(self):
        if not 0 <= self.background <= self.foreground < 1:
            raise ValueError(f"LabelConfig: expected 0 <= background <= foreground < 1, got {self.background} and "
                             f"{self.foreground}")  # fmt: skip

    def options(self) -> dict:
        """The keywords of `confident_labels`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(LabelConfig)}

    @classmethod
    def irn(cls) -> "LabelConfig":
        return cls()

    @classmethod
    def rib(cls) -> "LabelConfig":
        return cls(foreground=0.35, background=0.17)


@torch.no_grad()
def confident_labels(
    images: Tensor | np.ndarray | Sequence,
    maps: Tensor | np.ndarray | Sequence,
    keys: Tensor | Sequence,
    *,
    foreground: float = 0.30,
    background: float = 0.05,
    confidence: float = 0.7,
    gaussian: tuple[float, float] | None = (3.0, 3.0),
    bilateral: tuple[float, float, float] | None = (50.0, 5.0, 10.0),
    iterations: int = 10,
) -> Tensor | list[Tensor]:
    """(H, W) uint8 labels: class + 1 and 0, background, where that is sure, elsewhere 255.

    images: (H, W, 3) uint8 RGB; maps: (n, H, W) in [0, 1]; keys: their n classes from 0; tensors or numpy arrays. Or
    lists of these for images of any sizes and numbers of classes -> a list.
    Of each pixel the class with the largest map is taken that is above a constant, once above `foreground` and once
    above `background`, else background; the label CRF refines both label maps. The foreground's class is sure; where it
    says background, background is sure if the other one says so too.
    """
    op = "confident_labels"
    if not 0 <= contract.number(op, "background", background) <= contract.number(op, "foreground", foreground):
        raise ValueError(f"{op}: expected 0 <= background <= foreground, got {background} and {foreground}")
    single = isinstance(images, (Tensor, np.ndarray))
    if single:
        images, maps, keys = [images], [maps], [keys]
    images, maps = [_tensor(op, "images", image) for image in images], [_tensor(op, "maps", each) for each in maps]
    if not len(images) == len(maps) == len(keys):
        raise ValueError(f"{op}: expected maps and keys for each image, got {len(maps)} and {len(keys)} for "
                         f"{len(images)}")  # fmt: skip
    classes = [check_maps(op, image, each, k) for image, each, k in zip(images, maps, keys, strict=True)]
    terms = dict(confidence=confidence, gaussian=gaussian, bilateral=bilateral, iterations=iterations)
    members: dict[int, list[int]] = {}  # the CRF's number of labels is the image's own
    for number, own in enumerate(classes):
        members.setdefault(len(own), []).append(number)
    results = {}
    for count, numbers in members.items():
        given = [_above(maps[n], (foreground, background)) for n in numbers]
        if count:
            given = ops.dense_crf_labels([images[n] for n in numbers], given, count + 1, **terms)
        for number, (sure, possible) in zip(numbers, given, strict=True):
            labels = torch.zeros(count + 1, dtype=torch.uint8, device=sure.device)
            labels[1:] = classes[number] + 1
            unknown = (sure == 0) & (possible != 0)
            results[number] = labels[sure.int()].masked_fill_(unknown, UNKNOWN)
    return results[0] if single else [results[number] for number in range(len(results))]


def check_maps(op: str, image: Tensor, maps: Tensor, keys) -> Tensor:
    """The classes, on the maps' device, if the maps are those of the image."""
    classes = torch.as_tensor(keys).to(maps.device)
    contract.tensor(op, "maps", maps, 3, "(n, H, W)")
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{op}: expected images (H, W, 3) in uint8, got {image.dtype} {tuple(image.shape)}")
    if classes.ndim != 1 or maps.shape != (len(classes), *image.shape[:2]):
        raise ValueError(f"{op}: expected maps of {classes.numel()} keys and the image's size "
                         f"{tuple(image.shape[:2])}, got shape {tuple(maps.shape)}")  # fmt: skip
    contract.same_device(op, image, maps)
    return check_keys(op, classes, maps)


def check_keys(op: str, classes: Tensor, maps: Tensor) -> Tensor:
    if not len(classes):
        return classes
    if classes.is_floating_point() or classes.min() < 0 or classes.max() > MOST_CLASS:
        raise ValueError(f"{op}: expected keys from 0 to {MOST_CLASS}, got {classes.tolist()}")
    if not torch.isfinite(maps).all():
        raise ValueError(f"{op}: expected finite maps, got NaN or infinity")
    return classes


def _above(maps: Tensor, constants: Sequence[float]) -> Tensor:
    """For each constant, 1 + the number of the largest map where that is above it, else 0: (len(constants), H, W)."""
    if not len(maps):
        return torch.zeros(len(constants), *maps.shape[1:], dtype=torch.uint8, device=maps.device)
    largest, number = maps.max(0)
    return torch.stack([torch.where(largest > constant, number + 1, 0) for constant in constants]).to(torch.uint8)


def _tensor(op: str, name: str, value) -> Tensor:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.require(value, requirements=["C", "W"]))
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: expected {name} to be tensors or numpy arrays, got {type(value).__name__}")
    return value
