"""What networks see: photographs rescaled, mirrored, normalised and cropped."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor


class Normalization(NamedTuple):
    """(pixel / 255 - mean) / std of R, G, B."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def table(self) -> np.ndarray:
        """(3, 256) float32: what each pixel value becomes; computed in float64."""
        values = np.arange(256)[None] / 255
        return ((values - np.array(self.mean)[:, None]) / np.array(self.std)[:, None]).astype(np.float32)


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SYMMETRIC = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # pixel / 127.5 - 1
CAFFE = Normalization((122.675 / 255, 116.669 / 255, 104.008 / 255), (1 / 255,) * 3)  # pixel - mean
NORMALIZATIONS = {"imagenet": IMAGENET, "symmetric": SYMMETRIC, "caffe": CAFFE}


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) times the scale, halves to even as numpy and the released codes round, never below 1."""
    if not 0 < scale < float("inf"):
        raise ValueError(f"scaled_size: expected a scale above 0, got {scale}")
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def rescale(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bicubic (a = -0.5, widened when it shrinks) to (h, w), as PIL computes it and the released codes use it.

    torch's kernel for uint8 serves. Against Pillow on 41 photographs at scales 0.5 to 2: at most 0.4 % of the values
    differ, by 1 (one in a million by 2), in about a quarter of Pillow's time. Sides scaled very differently stray
    further, by up to 9 from 375x500 to 100x600. OpenCV's INTER_CUBIC has another a and does not widen: up to 132 levels
    off, 2.5 on average at scale 0.77; its INTER_AREA up to 97, 1.2 on average there.
    """
    _check_image(image, "rescale")
    if min(size) < 1:
        raise ValueError(f"rescale: expected a size of at least 1 x 1, got {size[0]} x {size[1]}")
    if tuple(size) == image.shape[:2]:
        return image.copy()
    pixels = _tensor(image)[None].permute(0, 3, 1, 2)  # (1, 3, H, W), interleaved as the image is
    return np.ascontiguousarray(_bicubic(pixels, size)[0].permute(1, 2, 0).numpy())


def reduce_to(image: np.ndarray, largest: int | None) -> np.ndarray:
    """The image where its longer side is at most `largest`, else rescaled to that. None: no bound."""
    _check_image(image, "reduce_to")
    side = max(image.shape[:2])
    if largest is None or side <= largest:
        return image
    return rescale(image, scaled_size(image.shape[:2], largest / side))


def make_views(
    image: np.ndarray,
    scales: Iterable[float] = (1.0, 0.5, 1.5, 2.0),
    normalization: Normalization = IMAGENET,
    *,
    mirror: bool = True,
) -> list[Tensor]:
    """For each scale, float32 (2, 3, h, w): the image, rescaled from the original and normalised, and its mirror.

    mirror=False: (1, 3, h, w), the image alone.
    """
    _check_image(image, "make_views")
    table, views = normalization.table(), []
    for scale in scales:
        planes = _planes(image, scaled_size(image.shape[:2], scale))
        view = np.empty((1 + mirror, *planes.shape), np.float32)
        for channel in range(3):
            cv2.LUT(planes[channel], table[channel], dst=view[0, channel])
            if mirror:
                cv2.flip(view[0, channel], 1, dst=view[1, channel])
        views.append(torch.from_numpy(view))
    return views


class _Crop(NamedTuple):
    """A training image's size, where the crop of it begins along each axis and lies in the result, and its length."""

    size: tuple[int, int]
    rows: tuple[int, int, int]
    columns: tuple[int, int, int]
    mirrored: bool


@dataclass(frozen=True)
class Augmentation:
    """Random size, mirror and crop of a training image; the same numpy Generator gives the same crops.

    The longer side becomes an integer of long_side, both ends included; or, where that is None, both sides are
    multiplied by a number between the two of rescale. flip mirrors every second image. The crop x crop box is
    normalised first and padded with zeros afterwards: along each axis it begins anywhere within an image that is
    larger, and a smaller image lies anywhere within it.
    """

    long_side: tuple[int, int] | None = (320, 640)
    crop: int = 512
    flip: bool = True
    normalization: Normalization = IMAGENET
    rescale: tuple[float, float] | None = None

    def __post_init__(self):
        if (self.long_side is None) == (self.rescale is None):
            raise ValueError(f"Augmentation: expected either long_side or rescale, got {self.long_side} and "
                             f"{self.rescale}")  # fmt: skip
        if self.rescale is not None and not 0 < self.rescale[0] <= self.rescale[1] < float("inf"):
            raise ValueError(f"Augmentation: expected 0 < rescale[0] <= rescale[1], got {self.rescale}")
        low, high = self.long_side or (1, 1)
        if not 1 <= low <= high or self.crop < 1:
            raise ValueError(f"Augmentation: expected 1 <= long_side[0] <= long_side[1] and a crop of at least 1, got "
                             f"long_side {self.long_side} and crop {self.crop}")  # fmt: skip

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> Tensor:
        """(H, W, 3) uint8 -> float32 (3, crop, crop)."""
        _check_image(image, "Augmentation")
        return self._image(image, self._draw(image.shape[:2], rng))

    def with_labels(self, image: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Also labels (H, W) uint8 -> (crop, crop) uint8: the nearest to each pixel's centre, 255 beyond the image."""
        _check_image(image, "Augmentation")
        if labels.dtype != np.uint8 or labels.shape != image.shape[:2]:
            raise ValueError(f"Augmentation: expected labels in uint8 of the image's size {image.shape[:2]}, got "
                             f"{labels.dtype} {labels.shape}")  # fmt: skip
        drawn = self._draw(image.shape[:2], rng)
        (y, top, height), (x, left, width) = drawn.rows, drawn.columns
        rows, columns = (_nearest(*sides) for sides in zip(labels.shape, drawn.size, strict=True))
        part = labels[rows[y : y + height, None], columns[x : x + width]]
        out = np.full((self.crop, self.crop), 255, np.uint8)
        out[top : top + height, left : left + width] = part[:, ::-1] if drawn.mirrored else part
        return self._image(image, drawn), torch.from_numpy(out)

    def _draw(self, size: tuple[int, int], rng: np.random.Generator) -> _Crop:
        if self.long_side is None:
            scale = rng.uniform(*self.rescale)
        else:
            scale = int(rng.integers(self.long_side[0], self.long_side[1] + 1)) / max(size)
        mirrored = self.flip and rng.random() < 0.5
        size = scaled_size(size, scale)
        rows, (x, left, width) = (self._place(side, rng) for side in size)
        if mirrored:  # cropped from the mirror, at the mirrored place
            x = size[1] - x - width
        return _Crop(size, rows, (x, left, width), mirrored)

    def _image(self, image: np.ndarray, drawn: _Crop) -> Tensor:
        planes, (y, top, height), (x, left, width) = _planes(image, drawn.size), drawn.rows, drawn.columns
        table, out = self.normalization.table(), np.zeros((3, self.crop, self.crop), np.float32)
        for channel in range(3):
            part = planes[channel, y : y + height, x : x + width]
            part = cv2.flip(part, 1) if drawn.mirrored else part
            cv2.LUT(part, table[channel], dst=out[channel, top : top + height, left : left + width])
        return torch.from_numpy(out)

    def _place(self, side: int, rng: np.random.Generator) -> tuple[int, int, int]:
        """Where the part begins in the image and in the crop, and its length."""
        begin = int(rng.integers(abs(side - self.crop) + 1))
        return (begin, 0, self.crop) if side > self.crop else (0, begin, side)


def _check_image(image: np.ndarray, op: str) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else f"a {type(image).__name__}"
        raise ValueError(f"{op}: expected a uint8 array (H, W, 3), got {kind}")
    if 0 in image.shape:
        raise ValueError(f"{op}: expected a picture with pixels, got {image.shape}")


def _tensor(image: np.ndarray) -> Tensor:
    """Cached images are read-only, which torch would warn of."""
    return torch.from_numpy(np.require(image, requirements=["C", "W"]))


def _nearest(side: int, wanted: int) -> np.ndarray:
    """Of `side` pixels, those in which the centres of `wanted` pixels lie."""
    return ((2 * np.arange(wanted) + 1) * side // (2 * wanted)).astype(np.intp)


def _bicubic(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.nn.functional.interpolate(pixels, size=tuple(size), mode="bicubic", antialias=True)


def _planes(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Rescaled as `rescale` does, but (3, h, w)."""
    planes = _tensor(image).permute(2, 0, 1)
    planes = planes if tuple(size) == image.shape[:2] else _bicubic(planes[None], size)[0]
    return planes.contiguous().numpy()
