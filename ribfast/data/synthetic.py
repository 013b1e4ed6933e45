"""A drawn data set with the trouble of image-level labels: what tells a class is a small part of its objects.

An object is a body in the class's hue, hardly more saturated than the clutter behind it, and a head in the same hue, a
tenth of its area, which nothing else resembles. Clutter has bodies' saturations, stripes and sizes in every hue, and
small saturated spots of its own between the classes' hues, so that no threshold on colour finds the objects.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

CLASSES = ("beetle", "frog", "fish", "moth")
DRAWN = "drawn.json"  # what is written first: how the pictures are drawn
LAST = "labels.csv"  # what is written last: where it is, all of the data is
HUES = (0, 45, 90, 135)  # of 180, as OpenCV counts
HUE_SPREAD = 7  # around a class's hue; clutter's spots keep twice as far from it
MOST = 3  # objects in an image
_SHIFT = 4  # bits of a pixel that shapes' places are rounded to


class Picture(NamedTuple):
    """image: (H, W, 3) uint8 RGB; mask: (H, W) uint8, class + 1; heads: (H, W) bool."""

    image: np.ndarray
    mask: np.ndarray
    heads: np.ndarray


def draw(folder: str | Path, *, training: int = 160, validation: int = 40, size: int = 96, seed: int = 0) -> None:
    """Writes what open_source("folder:...") reads, with masks, and the lists train.txt and val.txt; the same bytes for
    the same arguments, which DRAWN keeps. A folder of other files is refused."""
    check(training, validation, size)
    folder, rows, names = Path(folder), ["image,labels"], []
    if folder.is_dir() and any(folder.iterdir()) and drawn(folder) is None:
        raise ValueError(f"draw: expected a folder of pictures that were drawn, or none, got {folder} with other "
                         f"files; choose another")  # fmt: skip
    _clear(folder)
    for place in ("images", "masks"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    facts = {"training": training, "validation": validation, "size": size, "seed": seed}
    _write(folder / DRAWN, json.dumps(facts).encode())
    for number in range(training + validation):
        # each class in turn, so that the first few images have all of them
        picture = draw_picture(np.random.default_rng([seed, number]), size, number % len(CLASSES))
        name = f"{number:04}"
        names.append(name)
        present = [CLASSES[label - 1] for label in np.unique(picture.mask) if label]
        rows.append(f"{name}.png,{';'.join(present)}")
        for place, pixels in (("images", picture.image[..., ::-1]), ("masks", picture.mask)):
            _write(folder / place / f"{name}.png", cv2.imencode(".png", pixels)[1].tobytes())
    lists = {"classes.txt": CLASSES, "train.txt": names[:training], "val.txt": names[training:], LAST: rows}
    for name, lines in lists.items():
        _write(folder / name, "".join(f"{line}\n" for line in lines).encode())


def check(training: int, validation: int = 0, size: int = 96) -> None:
    """Raises where so many pictures cannot be drawn."""
    if training < len(CLASSES) or validation < 0 or size < 48:
        raise ValueError(f"draw: expected at least {len(CLASSES)} training images, 0 for validation and 48 pixels, got "
                         f"{training}, {validation} and {size}")  # fmt: skip


def drawn(folder: str | Path) -> dict | None:
    """The arguments that a folder's pictures were drawn with, or were to be; None: it holds none."""
    path = Path(folder) / DRAWN
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def _clear(folder: Path) -> None:
    """Removes what was drawn there before; first the table, which says that all is there."""
    before = drawn(folder)
    if before is None:
        return
    (folder / LAST).unlink(missing_ok=True)
    for number in range(before["training"] + before["validation"]):
        for place in ("images", "masks"):
            (folder / place / f"{number:04}.png").unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    """Whole, or not at all."""
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    partial.write_bytes(content)
    os.replace(partial, path)


def draw_picture(rng: np.random.Generator, size: int, first: int) -> Picture:
    """One to three objects, apart from one another, the first of a given class."""
    image = _clutter(rng, size)
    mask, heads = np.zeros((size, size), np.uint8), np.zeros((size, size), bool)
    count = 1 + int(rng.integers(MOST))
    for label in [first, *rng.integers(len(CLASSES), size=count - 1)]:
        shapes = _place(rng, size, mask)
        if shapes is None:  # there is no room left
            break
        body, head = shapes
        hue = HUES[label] + rng.uniform(-HUE_SPREAD, HUE_SPREAD)
        _fill(image, body, _texture(rng, size, hue, rng.uniform(50, 85), rng.uniform(95, 175)))
        _fill(image, head, _texture(rng, size, hue, rng.uniform(200, 235), rng.uniform(150, 200)))
        mask[(body > 0.5) | (head > 0.5)] = label + 1
        heads |= head > 0.5
    noise = rng.normal(0, 2.5, image.shape)
    return Picture(np.rint(image + noise).clip(0, 255).astype(np.uint8), mask, heads)


def _clutter(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) float64: overlapping ellipses, and few small spots between the classes' hues."""

    def blob(side_low: float, side_high: float) -> np.ndarray:
        centre, sides = rng.uniform(0, size, 2), rng.uniform(side_low, side_high, 2) * size
        return _ellipse(size, centre, sides, rng.uniform(0, np.pi))

    image = _texture(rng, size, rng.uniform(0, 180), rng.uniform(0, 80), rng.uniform(80, 180))
    for _ in range(36):
        shape = blob(0.06, 0.2)
        _fill(image, shape, _texture(rng, size, rng.uniform(0, 180), rng.uniform(5, 90), rng.uniform(80, 190)))
    for _ in range(int(rng.integers(3))):
        shape = blob(0.03, 0.06)
        gap = HUES[rng.integers(len(HUES))] + 22.5 + rng.uniform(-6, 6)
        _fill(image, shape, _texture(rng, size, gap, rng.uniform(180, 235), rng.uniform(150, 200)))
    return image


def _place(rng: np.random.Generator, size: int, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """A body and its head, (size, size) shares of pixels, apart from other objects; None if no try finds room."""
    for _ in range(30):
        sides = rng.uniform((0.23, 0.15), (0.31, 0.2)) * size
        angle, centre = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.8, 2) * size
        nose = centre + 0.95 * sides[0] * np.array([np.cos(angle), np.sin(angle)])
        radius = 0.32 * np.sqrt(sides.prod())
        if nose.min() < radius or nose.max() > size - radius:  # the head would not be whole
            continue
        body, head = _ellipse(size, centre, sides, angle), _ellipse(size, nose, np.full(2, radius), 0)
        near = cv2.dilate(((body > 0) | (head > 0)).astype(np.uint8), np.ones((5, 5), np.uint8))
        if not (mask * near).any():
            return body, head
    return None


def _ellipse(size: int, centre: np.ndarray, sides: np.ndarray, angle: float) -> np.ndarray:
    """(size, size) float64: how much of each pixel it covers."""
    shares = np.zeros((size, size), np.uint8)
    at, axes = (tuple(np.rint(pair * 2**_SHIFT).astype(int).tolist()) for pair in (centre, sides))
    cv2.ellipse(shares, at, axes, float(np.degrees(angle)), 0, 360, 255, -1, cv2.LINE_AA, _SHIFT)
    return shares / 255.0


def _texture(rng: np.random.Generator, size: int, hue: float, saturation: float, value: float) -> np.ndarray:
    """(size, size, 3) float64 RGB: faint stripes of any direction and width."""
    y, x = np.mgrid[:size, :size]
    angle, pitch = rng.uniform(0, np.pi), rng.uniform(0.3, 1.2)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * pitch + rng.uniform(0, 2 * np.pi))
    planes = np.broadcast_to([hue % 180, saturation, value], (size, size, 3)).copy()
    planes[..., 2] += rng.uniform(0, 9) * wave
    return cv2.cvtColor(planes.clip(0, 255).astype(np.uint8), cv2.COLOR_HSV2RGB).astype(np.float64)


def _fill(image: np.ndarray, shape: np.ndarray, texture: np.ndarray) -> None:
    image += shape[..., None] * (texture - image)
