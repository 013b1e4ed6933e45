"""Mean intersection over union: of label maps, and of class maps at every background threshold at once; precision."""

import math
from collections.abc import Sequence

import numpy as np

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
        labels, mask = np.asarray(labels), np.asarray(mask)
        if labels.shape != mask.shape:
            raise ValueError(f"Confusion.add: expected labels of the mask's shape {mask.shape}, got {labels.shape}")
        _check_labels(labels, self.n_classes, "Confusion.add", "labels")
        true = _true_labels(mask, self.n_classes, "Confusion.add")
        side = self.n_classes + 1
        pairs = true.astype(np.intp) * side + labels[mask != IGNORED]
        self.matrix += np.bincount(pairs, minlength=side**2).reshape(side, side)

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


class ThresholdSweep:
    """IoU of class maps in [0, 1] at every background threshold, in one pass over the pixels.

    At threshold t a pixel's label is the argmax over (t, the maps of its image's classes), the first of equals: it is
    background unless a map exceeds t. So it needs the largest map's value and class alone, and the number of thresholds
    below that value; counts of these, summed from above, are those of every threshold. Comparisons are in float32.
    """

    def __init__(self, n_classes: int, thresholds: Sequence[float]):
        self.n_classes = _check_classes(n_classes, "ThresholdSweep")
        self.thresholds = np.asarray(thresholds, np.float64)
        if self.thresholds.ndim != 1 or not len(self.thresholds) or not np.isfinite(self.thresholds).all():
            raise ValueError(f"ThresholdSweep: expected a list of finite thresholds, got {thresholds!r}")
        self._order = np.argsort(self.thresholds, kind="stable")
        self._edges = self.thresholds[self._order].astype(np.float32)
        # pixels by how many thresholds lie below them, and class: predicted, and those of them that hold it
        self._predicted = np.zeros((len(self.thresholds) + 1, n_classes), np.int64)
        self._right = np.zeros_like(self._predicted)
        self._background = np.zeros(len(self.thresholds) + 1, np.int64)  # pixels that are background
        self._true = np.zeros(n_classes + 1, np.int64)

    def add(self, high_res, keys, mask) -> None:
        """high_res (n, H, W): a map for each of keys (n,), the image's 0-based classes; mask (H, W)."""
        high_res, keys, mask = np.asarray(high_res, np.float32), np.asarray(keys, np.int64).ravel(), np.asarray(mask)
        if high_res.ndim != 3 or len(high_res) != len(keys) or (len(keys) and high_res.shape[1:] != mask.shape):
            raise ValueError(f"ThresholdSweep.add: expected high_res ({len(keys)}, {', '.join(map(str, mask.shape))}) "
                             f"as keys and mask have it, got {high_res.shape}")  # fmt: skip
        if len(np.unique(keys)) != len(keys) or (len(keys) and not 0 <= keys.min() <= keys.max() < self.n_classes):
            raise ValueError(f"ThresholdSweep.add: expected each key once and in 0..{self.n_classes - 1}, got "
                             f"{keys.tolist()}")  # fmt: skip
        true = _true_labels(mask, self.n_classes, "ThresholdSweep.add").astype(np.intp)
        counts = np.bincount(true, minlength=self.n_classes + 1)
        if not len(keys):
            self._true += counts
            self._background[0] += counts[0]
            return
        counted = mask != IGNORED
        best, winner = high_res[0][counted], np.zeros(len(true), np.intp)
        for index, plane in enumerate(high_res[1:], 1):
            values = plane[counted]
            winner[values > best] = index
            best = np.maximum(best, values)
        if np.isnan(best).any():
            raise ValueError("ThresholdSweep.add: expected maps without NaN")
        below = np.searchsorted(self._edges, best)
        kind = np.where(true == 0, 2, true == keys[winner] + 1)  # 0 another class, 1 right, 2 background
        shape = len(self._edges) + 1, len(keys), 3
        table = np.bincount((below * len(keys) + winner) * 3 + kind, minlength=math.prod(shape)).reshape(shape)
        self._true += counts
        self._predicted[:, keys] += table.sum(2)
        self._right[:, keys] += table[..., 1]
        self._background += table[..., 2].sum(1)

    def merge(self, other: "ThresholdSweep") -> None:
        """Adds what another one counted on other images."""
        if other.n_classes != self.n_classes or not np.array_equal(other.thresholds, self.thresholds):
            raise ValueError("ThresholdSweep.merge: expected the same number of classes and thresholds, got others")
        for name in ("_predicted", "_right", "_background", "_true"):
            getattr(self, name).__iadd__(getattr(other, name))

    def ious(self) -> np.ndarray:
        """(thresholds, n_classes + 1), background first; NaN where a class is neither present nor predicted."""

        def above(counts):  # what exceeds each threshold
            return counts[::-1].cumsum(0)[::-1][1:]

        predicted, right = above(self._predicted), above(self._right)
        predicted = np.column_stack([self._true.sum() - predicted.sum(1), predicted])
        right = np.column_stack([self._true[0] - above(self._background), right])
        ious = np.empty(right.shape)
        ious[self._order] = _iou(right, predicted, self._true)
        return ious

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


def _true_labels(mask: np.ndarray, n_classes: int, op: str) -> np.ndarray:
    """A mask's pixels that are not ignored."""
    true = mask[mask != IGNORED]
    _check_labels(true, n_classes, op, "labels in the mask (or 255, ignored)")
    return true


def _iou(right: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    union = predicted + true - right
    return np.where(union > 0, right / np.maximum(union, 1), np.nan)


def _mean(ious: np.ndarray) -> np.ndarray:
    """Over the last dimension's numbers; NaN where there is none."""
    there = ~np.isnan(ious)
    count = there.sum(-1)
    return np.where(count > 0, np.where(there, ious, 0).sum(-1) / np.maximum(count, 1), np.nan)
