"""Mean intersection over union: of label maps, of class maps at every background threshold at once; and intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from . import ops

IGNORED = 255


class Confusion:
    """Counts pixels by their true and predicted label, 0 (background) to n_classes; 255 in a mask is ignored.

    matrix: (n_classes + 1, n_classes + 1) int64, rows true.
    """

    def __init__(self, n_classes: int):
        self.n_classes = _check_classes(n_classes, "Confusion")
        self.matrix = np.zeros((n_classes + 1, n_classes + 1), np.int64)

    def add(self, labels, mask) -> None:
        """labels, mask (H, W) integers: predicted and true."""
        self.matrix += self.count(labels, mask)

    def count(self, labels, mask) -> np.ndarray:
        """An image's matrix, which is not added. Any number of threads may count."""
        labels, mask = np.asarray(labels), np.asarray(mask)
        if labels.shape != mask.shape:
            raise ValueError(f"Confusion.add: expected labels of the mask's shape {mask.shape}, got {labels.shape}")
        _check_labels(labels, self.n_classes, "Confusion.add", "labels")
        true = _as_labels(mask, self.n_classes, "Confusion.add")
        labels, true = torch.from_numpy(_writeable(labels)), torch.from_numpy(true)
        try:
            return ops.confusion_matrix(labels, true, self.n_classes + 1).numpy()
        except ValueError:
            _check_mask(mask, self.n_classes, "Confusion.add")  # which names the label
            raise

    def merge(self, other: "Confusion") -> None:
        """Adds what another one counted on other images."""
        if other.n_classes != self.n_classes:
            raise ValueError(f"Confusion.merge: expected {self.n_classes} classes, got {other.n_classes}")
        self.matrix += other.matrix

    def iou(self) -> np.ndarray:
        """(n_classes + 1,) float64, background first; NaN where a class is neither present nor predicted."""
        return _iou(np.diagonal(self.matrix), self.matrix.sum(0), self.matrix.sum(1))

    def miou(self) -> float:
        """Over the classes that are present or predicted; NaN if nothing was added."""
        return float(_mean(self.iou()))

    def precision(self) -> np.ndarray:
        """(n_classes + 1,): right pixels among those predicted; NaN where a class is not predicted."""
        return _share(np.diagonal(self.matrix), self.matrix.sum(0))

    def recall(self) -> np.ndarray:
        """(n_classes + 1,): right pixels among those that hold it; NaN where a class is not present."""
        return _share(np.diagonal(self.matrix), self.matrix.sum(1))

    def f1(self) -> np.ndarray:
        """(n_classes + 1,), the harmonic mean of both; NaN where a class is neither present nor predicted."""
        return _share(2 * np.diagonal(self.matrix), self.matrix.sum(0) + self.matrix.sum(1))


class Counts(NamedTuple):
    """One image's part of a sweep."""

    keys: np.ndarray  # (n,): its classes, 0-based
    histogram: np.ndarray  # (n_classes + 1, n, thresholds + 1) by true label, largest map, ascending thresholds below
    true: np.ndarray  # (n_classes + 1,): pixels by true label


class ThresholdSweep:
    """IoU of class maps in [0, 1] at every background threshold, in one pass over the pixels.

    At threshold t a pixel's label is the argmax over (t, the maps of its image's classes), the first of equals: it is
    background unless a map exceeds t. So it needs the largest map's value and class alone, and the number of thresholds
    below that value; counts of these, summed from above, are those of every threshold. Comparisons are in float32.
    Memory does not grow with the images: (n_classes + 1) n_classes (thresholds + 1) numbers.
    """

    def __init__(self, n_classes: int, thresholds: Sequence[float]):
        self.n_classes = _check_classes(n_classes, "ThresholdSweep")
        self.thresholds = np.asarray(thresholds, np.float64)
        if self.thresholds.ndim != 1 or not len(self.thresholds) or not np.isfinite(self.thresholds).all():
            raise ValueError(f"ThresholdSweep: expected a list of finite thresholds, got {thresholds!r}")
        self._order = np.argsort(self.thresholds, kind="stable")
        self._rank = np.argsort(self._order)
        self._edges = torch.from_numpy(self.thresholds[self._order].astype(np.float32))
        self._histogram = np.zeros((n_classes + 1, n_classes, len(self.thresholds) + 1), np.int64)
        self._true = np.zeros(n_classes + 1, np.int64)

    def count(self, maps, keys, mask, *, stride: int = 1) -> Counts:
        """maps (n, H, W), or each side over `stride`, which are enlarged as cams.enlarge_cams does it: a map for each
        of keys (n,), the image's 0-based classes; mask (H, W). Any number of threads may count."""
        maps, keys, mask = torch.as_tensor(maps), np.asarray(keys, np.int64).ravel(), np.asarray(mask)
        maps = maps if maps.is_floating_point() else maps.float()
        expected = (len(keys), *(-(-side // stride) for side in mask.shape))
        if maps.ndim != 3 or len(maps) != len(keys) or (len(keys) and tuple(maps.shape) != expected):
            raise ValueError(f"ThresholdSweep.add: expected maps {expected} as keys, mask {mask.shape} and a stride of "
                             f"{stride} have it, got {tuple(maps.shape)}")  # fmt: skip
        if len(np.unique(keys)) != len(keys) or (len(keys) and not 0 <= keys.min() <= keys.max() < self.n_classes):
            raise ValueError(f"ThresholdSweep.add: expected each key once and in 0..{self.n_classes - 1}, got "
                             f"{keys.tolist()}")  # fmt: skip
        labels = torch.from_numpy(_as_labels(mask, self.n_classes, "ThresholdSweep.add"))
        if not len(keys):
            zero = np.zeros(mask.shape, np.uint8)
            true = Confusion(self.n_classes).count(zero, mask)[:, 0]
            return Counts(keys, np.zeros((self.n_classes + 1, 0, len(self._edges) + 1), np.int64), true)
        try:
            found = ops.threshold_histogram(maps, labels, self._edges, self.n_classes + 1, stride=stride).numpy()
        except ValueError:
            _check_mask(mask, self.n_classes, "ThresholdSweep.add")  # which names the label
            raise
        return Counts(keys, found, found.sum((1, 2)))

    def add_counts(self, counts: Counts) -> None:
        self._histogram[:, counts.keys] += counts.histogram
        self._true += counts.true

    def add(self, maps, keys, mask, *, stride: int = 1) -> None:
        """What `count` takes."""
        self.add_counts(self.count(maps, keys, mask, stride=stride))

    def merge(self, other: "ThresholdSweep") -> None:
        """Adds what another one counted on other images."""
        if other.n_classes != self.n_classes or not np.array_equal(other.thresholds, self.thresholds):
            raise ValueError("ThresholdSweep.merge: expected the same number of classes and thresholds, got others")
        self._histogram += other._histogram
        self._true += other._true

    def confusion(self, index: int) -> Confusion:
        """At thresholds[index]."""
        found = Confusion(self.n_classes)
        found.matrix[:, 1:] = self._histogram[:, :, self._rank[index] + 1 :].sum(2)
        found.matrix[:, 0] = self._true - found.matrix[:, 1:].sum(1)
        return found

    def ious(self) -> np.ndarray:
        """(thresholds, n_classes + 1), background first; NaN where a class is neither present nor predicted."""
        classes = np.arange(self.n_classes)
        predicted, right = _above(self._histogram.sum(0)).T, _above(self._histogram[classes + 1, classes]).T
        background = self._true[0] - _above(self._histogram[0].sum(0))
        predicted = np.column_stack([self._true.sum() - predicted.sum(1), predicted])
        return _iou(np.column_stack([background, right]), predicted, self._true)[self._rank]

    def mious(self) -> np.ndarray:
        """(thresholds,)"""
        return _mean(self.ious())

    def best(self) -> tuple[float, float]:
        """(threshold, mIoU), the first of equals. Choose it on one split and report another."""
        if not self._true.sum():
            raise ValueError("ThresholdSweep.best: expected images, got none; add some first")
        mious = self.mious()
        index = int(mious.argmax())
        return float(self.thresholds[index]), float(mious[index])


class PerImage:
    """What each image adds to the IoU, for intervals over images.

    Of label maps 3 numbers a class that an image has to do with, of a sweep's images 3 curves over the thresholds, so
    that one may be chosen afterwards: (2 n + 1) (thresholds + 1) numbers of 32 bits for n classes on the image.
    """

    def __init__(self, n_classes: int, thresholds: Sequence[float] = (0.0,)):
        self.n_classes = _check_classes(n_classes, "PerImage")
        self._rank = np.argsort(np.argsort(np.asarray(thresholds, np.float64), kind="stable"))
        self._images: list[tuple] = []

    def __len__(self) -> int:
        return len(self._images)

    def add_counts(self, counts: Counts) -> None:
        predicted = _above(counts.histogram.sum(0))
        right = _above(counts.histogram[counts.keys + 1, np.arange(len(counts.keys))])
        background = counts.true[0] - _above(counts.histogram[0].sum(0))
        self._add(counts.keys, predicted, right, background, counts.true)

    def add_matrix(self, matrix: np.ndarray) -> None:
        """One image's confusion matrix."""
        predicted, right = matrix.sum(0)[1:], np.diagonal(matrix)[1:]
        keys = np.flatnonzero(predicted)
        self._add(keys, predicted[keys, None], right[keys, None], matrix[:1, 0], matrix.sum(1))

    def _add(self, keys, predicted, right, background, true) -> None:
        labels = np.flatnonzero(true)
        pixels = (part.astype(np.int32) for part in (predicted, right, background, true[labels]))
        self._images.append((keys.astype(np.uint8), labels.astype(np.uint8), *pixels))

    def numbers(self, index: int = 0) -> np.ndarray:
        """(images, 3, n_classes + 1) at thresholds[index]: right, predicted and true pixels of each label."""
        found = np.zeros((len(self._images), 3, self.n_classes + 1), np.int32)
        at = int(self._rank[index])
        for image, (keys, labels, predicted, right, background, true) in zip(found, self._images, strict=True):
            image[2, labels] = true
            image[0, 0], image[0, keys.astype(np.intp) + 1] = background[at], right[:, at]
            image[1, keys.astype(np.intp) + 1] = predicted[:, at]
            image[1, 0] = true.sum() - predicted[:, at].sum()
        return found


def bootstrap_interval(
    numbers: np.ndarray, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of mIoU over images drawn with replacement; NaN if no image has a pixel.

    numbers: (images, 3, labels), as PerImage has them. The same numbers and seed give the same interval.
    """
    return _interval(_resampled(numbers, resamples, seed, "bootstrap_interval"), confidence, "bootstrap_interval")


def bootstrap_gain(
    numbers: np.ndarray, before: np.ndarray, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of what mIoU gains over `before`, numbers of the same images in the same order.

    Each resample draws the same images of both: what makes an image hard for both does not widen the interval.
    """
    if np.shape(numbers) != np.shape(before):
        raise ValueError(f"bootstrap_gain: expected numbers of the same images and labels, got {np.shape(numbers)} and "
                         f"{np.shape(before)}")  # fmt: skip
    after, before = (_resampled(part, resamples, seed, "bootstrap_gain") for part in (numbers, before))
    return _interval(after - before, confidence, "bootstrap_gain")


def _resampled(numbers: np.ndarray, resamples: int, seed: int, op: str) -> np.ndarray:
    """(resamples,): mIoU of images drawn with replacement, which are the same of as many images and a seed."""
    numbers = np.asarray(numbers)
    if numbers.ndim != 3 or numbers.shape[1] != 3 or not len(numbers):
        raise ValueError(f"{op}: expected numbers (images, 3, labels), got {numbers.shape}")
    if resamples < 1:
        raise ValueError(f"{op}: expected resamples of at least 1, got {resamples}")
    draw, images, mious = np.random.default_rng(seed), len(numbers), []
    flat, at_once = numbers.reshape(images, -1), max(1, (1 << 21) // images)
    for begin in range(0, resamples, at_once):
        count = min(at_once, resamples - begin)
        times = np.stack([np.bincount(draw.integers(images, size=images), minlength=images) for _ in range(count)])
        total = np.zeros((count, flat.shape[1]))
        for part in range(0, images, 8192):  # sums of whole numbers below 2^53 are exact in any order
            total += times[:, part : part + 8192].astype(np.float64) @ flat[part : part + 8192].astype(np.float64)
        right, predicted, true = total.reshape(count, *numbers.shape[1:]).transpose(1, 0, 2)
        mious.append(_mean(_iou(right, predicted, true)))
    return np.concatenate(mious)


def _interval(values: np.ndarray, confidence: float, op: str) -> tuple[float, float]:
    """The percentiles that hold so much of them; NaN if there are none."""
    if not 0 < confidence < 1:
        raise ValueError(f"{op}: expected a confidence between 0 and 1, got {confidence}")
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def average_precision(scores, labels) -> np.ndarray:
    """(C,) of images ranked by each class's score, not interpolated; NaN for a class that no image holds.

    scores, labels: (N, C). Of equal scores the images without the class come first, so that ties gain nothing.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, bool)
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(f"average_precision: expected scores and labels (N, C), got {scores.shape} and {labels.shape}")
    order = np.lexsort((labels, -scores), axis=0)
    ranked = np.take_along_axis(labels, order, 0)
    precision = ranked.cumsum(0) / np.arange(1, len(ranked) + 1)[:, None]
    count = ranked.sum(0)
    return np.where(count > 0, (precision * ranked).sum(0) / np.maximum(count, 1), np.nan)


def _check_classes(n_classes: int, op: str) -> int:
    if isinstance(n_classes, bool) or not isinstance(n_classes, int) or not 1 <= n_classes < IGNORED:
        raise ValueError(f"{op}: expected n_classes of 1 to {IGNORED - 1}, got {n_classes!r}")
    return n_classes


def _check_labels(labels: np.ndarray, n_classes: int, op: str, what: str) -> None:
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{op}: expected integer {what}, got {labels.dtype}")
    if labels.size and not 0 <= labels.min() <= labels.max() <= n_classes:
        wrong = labels.max() if labels.max() > n_classes else labels.min()
        raise ValueError(f"{op}: expected {what} of 0 to {n_classes}, got {wrong}")


def _as_labels(mask: np.ndarray, n_classes: int, op: str) -> np.ndarray:
    """A mask as uint8, whose values are checked unless it is of that kind: then the operator does it."""
    if mask.dtype != np.uint8:
        _check_mask(mask, n_classes, op)
    return _writeable(mask)


def _check_mask(mask: np.ndarray, n_classes: int, op: str) -> None:
    _check_labels(mask[mask != IGNORED], n_classes, op, "labels in the mask (or 255, ignored)")


def _writeable(labels: np.ndarray) -> np.ndarray:
    """As uint8 that torch takes without a warning."""
    labels = np.ascontiguousarray(labels, np.uint8)
    return labels if labels.flags.writeable else labels.copy()


def _above(counts: np.ndarray) -> np.ndarray:
    """(..., thresholds + 1) pixels by how many thresholds lie below -> (..., thresholds), those that exceed each."""
    return counts[..., ::-1].cumsum(-1)[..., ::-1][..., 1:]


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _iou(right: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    return _share(right, predicted + true - right)


def _mean(ious: np.ndarray) -> np.ndarray:
    """Over the last dimension's numbers; NaN where there is none."""
    there = ~np.isnan(ious)
    count = there.sum(-1)
    return np.where(count > 0, np.where(there, ious, 0).sum(-1) / np.maximum(count, 1), np.nan)
