"""Label maps that networks are trained on, by the images' names."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from .. import data
from ..data.decode import read_mask

Labels = Callable[[str], np.ndarray] | Mapping[str, np.ndarray] | str | Path


def reader(op: str, source: data.Source, labels: Labels) -> Callable[[str], np.ndarray]:
    """An image's (H, W) uint8 by its name: from a function, a mapping, or a folder of NAME.png."""
    if callable(labels):
        return labels
    if isinstance(labels, Mapping):
        place, missing = "the mapping", [item.name for item in source if item.name not in labels]
    else:
        place = folder = Path(labels)
        missing = [item.name for item in source if not (folder / f"{item.name}.png").is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{op}: expected labels of {len(source)} images in {place}, got none of "
                         f"{', '.join(missing[:3])}{more}; make them first")  # fmt: skip
    return labels.__getitem__ if isinstance(labels, Mapping) else lambda name: read_mask(folder / f"{name}.png")


def inputs(source: data.Source, labels: Labels | None, weights: str | Path | None) -> dict[str, str]:
    """What a training must be given again to go on: the images, a folder's labels (names and sizes), the weights."""
    found = {"data": source.digest()}
    if isinstance(labels, (str, Path)):
        sizes = [(item.name, (Path(labels) / f"{item.name}.png").stat().st_size) for item in source]
        found["labels"] = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    if weights is not None:
        with open(weights, "rb") as file:
            found["weights"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def changed(mine: dict[str, str], known: Mapping[str, str]) -> list[str]:
    """The inputs that an earlier run, by its metadata, had otherwise."""
    return [name for name, digest in mine.items() if known.get(name, digest) != digest]
