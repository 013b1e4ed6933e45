"""What maps and masks are worth against ground truth."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from .. import data
from ..metrics import Confusion, PerImage, ThresholdSweep, bootstrap_interval
from ..store import Store
from .stage import first_few


@dataclass(frozen=True)
class EvaluateConfig:
    thresholds: str = "0:0.6:0.01"  # of the background: lowest:highest:step
    format: Literal["auto", "npz", "irn", "pmm"] = "auto"  # of the files; auto: what they are
    resamples: int = 1000  # of the images, for the interval of mIoU; 0: none, and no memory that grows with the images
    confidence: float = 0.95  # of that interval
    seed: int = 0  # of its resamples
    workers: int = 2  # threads that read and count; results do not depend on them

    def __post_init__(self):
        self.values()
        if self.workers < 0 or self.resamples < 0 or not 0 < self.confidence < 1:
            raise ValueError(f"EvaluateConfig: expected workers and resamples of at least 0 and a confidence between 0 "
                             f"and 1, got {self.workers}, {self.resamples} and {self.confidence}")  # fmt: skip

    def values(self) -> np.ndarray:
        try:
            low, high, step = map(float, self.thresholds.split(":"))
            if not (step > 0 and low <= high < low + 1000 * step):
                raise ValueError
        except ValueError:
            raise ValueError(f"EvaluateConfig: expected thresholds lowest:highest:step, at most 1000, got "
                             f"{self.thresholds!r}") from None  # fmt: skip
        return np.round(low + step * np.arange(math.floor((high - low) / step + 1e-6) + 1), 10)


def evaluate_maps(
    source: data.Source,
    store: Store,
    config: EvaluateConfig | None = None,
    *,
    threshold: float | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    keep: Callable[[np.ndarray], None] | None = None,
) -> dict:
    """mIoU of the store's maps against the source's masks at every threshold; IoU, precision and recall of each class
    at one of them, and mIoU's interval over images.

    threshold: that one, as chosen on other images; None: the best, which says too much of the images it is chosen on.
    keep: is given what each image with a mask adds at that one, in order, as PerImage.numbers has it.
    Images without masks are left out; those without classes count as background.
    """
    config = config or EvaluateConfig()
    items = _with_masks(source)
    _refuse_missing(items, "maps", store.folder, lambda item: not item.classes or item.name in store)
    grid = config.values() if threshold is None else np.union1d(config.values(), [threshold])
    sweep, images = ThresholdSweep(len(source.classes), grid), PerImage(len(source.classes), grid)

    def count(item: data.Item):
        with _named(item.name):
            mask = source.mask(item)
            if not item.classes:
                return sweep.count(np.empty((0, 0, 0), np.float32), (), mask)
            maps = store.read(item.name)
            if 0 not in maps.size and maps.size != mask.shape:
                raise ValueError(f"expected maps of the mask's size {mask.shape}, got {maps.size}")
            if maps.high_res is None:
                return sweep.count(maps.cam, maps.keys, mask, stride=4)
            return sweep.count(maps.high_res, maps.keys, mask)

    for counts in _counted(count, items, config, progress):
        sweep.add_counts(counts)
        if config.resamples or keep is not None:
            images.add_counts(counts)
    mious, (best, best_miou) = sweep.mious(), sweep.best()
    at = best if threshold is None else threshold
    row = int(np.flatnonzero(grid == at)[0])
    return {
        "images": len(items),
        "thresholds": grid.tolist(),
        "mious": mious.tolist(),
        "best": {"threshold": best, "miou": best_miou, "at_end": len(grid) > 2 and best in (grid[0], grid[-1])},
        "reported": {
            "threshold": at,
            "miou": float(mious[row]),
            "chosen": "here" if threshold is None else "elsewhere",
        },
        "interval": _interval(images, row, config, keep),
        **_of_classes(sweep.confusion(row), source.classes),
    }


def evaluate_masks(
    source: data.Source,
    store: Store,
    config: EvaluateConfig | None = None,
    *,
    progress: Callable[[int, int, str], None] | None = None,
    keep: Callable[[np.ndarray], None] | None = None,
) -> dict:
    """The same of the store's masks. 255 in them, where they leave a label open, counts as background, as in IRN.

    keep: is given what each image with a mask adds, in order, as PerImage.numbers has it.
    """
    config = config or EvaluateConfig()
    items = _with_masks(source)
    _refuse_missing(items, "masks", store.folder, lambda item: store.has_mask(item.name))
    confusion, images, unsure, pixels = Confusion(len(source.classes)), PerImage(len(source.classes)), 0, 0

    def count(item: data.Item):
        with _named(item.name):
            labels, mask = store.load_mask(item.name), source.mask(item)
            if labels.shape != mask.shape:
                raise ValueError(f"expected labels of the mask's size {mask.shape}, got {labels.shape}")
            open_ = labels == 255
            if open_.any():
                labels[open_] = 0
            counted = int((open_ & (mask != 255)).sum()) if open_.any() else 0
            return confusion.count(labels, mask), counted

    for matrix, open_pixels in _counted(count, items, config, progress):
        confusion.matrix += matrix
        unsure, pixels = unsure + open_pixels, pixels + int(matrix.sum())
        if config.resamples or keep is not None:
            images.add_matrix(matrix)
    return {
        "images": len(items),
        "reported": {"miou": confusion.miou()},
        "interval": _interval(images, 0, config, keep),
        "unsure": unsure / max(1, pixels),
        **_of_classes(confusion, source.classes),
    }


def read_threshold(path: str | Path) -> float:
    """The best threshold of an evaluation.json."""
    try:
        return float(json.loads(Path(path).read_text("utf-8"))["best"]["threshold"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"evaluate: expected an evaluation.json with a best threshold, got {path}") from error


def _with_masks(source: data.Source) -> list[data.Item]:
    items = list(source.masked())
    if not items:
        raise ValueError(f"evaluate: expected images with masks, got {len(source)} without any")
    return items


def _refuse_missing(items: list[data.Item], what: str, folder: Path, is_there: Callable) -> None:
    missing = [item.name for item in items if not is_there(item)]
    if missing:
        raise FileNotFoundError(f"evaluate: expected {what} of {len(items)} images in {folder}, got none of "
                                f"{first_few(missing)}; make them first")  # fmt: skip


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"evaluate: {name}: {error}") from error


def _counted(count: Callable, items: list[data.Item], config: EvaluateConfig, progress) -> Iterator:
    """By threads: what they spend their time in, decoding and counting, leaves Python's lock to others."""
    ahead = max(4, 2 * config.workers)
    if progress is not None:
        progress(0, len(items), "")
    for done, (item, found) in enumerate(zip(items, data.prefetch(count, items, workers=config.workers, ahead=ahead),
                                             strict=True), 1):  # fmt: skip
        yield found
        if progress is not None:
            progress(done, len(items), item.name)


def _interval(images: PerImage, row: int, config: EvaluateConfig, keep: Callable | None) -> dict | None:
    numbers = images.numbers(row) if config.resamples or keep is not None else None
    if keep is not None:
        keep(numbers)
    if not config.resamples:
        return None
    facts = {"confidence": config.confidence, "resamples": config.resamples, "seed": config.seed}
    low, high = bootstrap_interval(numbers, **facts)
    return {"low": _number(low), "high": _number(high), **facts}


def _of_classes(confusion: Confusion, classes: tuple[str, ...]) -> dict:
    names = ("background", *classes)
    measures = {"ious": confusion.iou(), "precision": confusion.precision(), "recall": confusion.recall(),
                "f1": confusion.f1()}  # fmt: skip
    return {measure: dict(zip(names, map(_number, values), strict=True)) for measure, values in measures.items()}


def _number(value: float) -> float | None:
    """As JSON has it."""
    return None if math.isnan(value) else float(value)
