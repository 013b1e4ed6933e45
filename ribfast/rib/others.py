"""Which other images are adapted to beside a target: drawn for each block of a label set, the same in every run."""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from ..data import Source
from .config import RIBConfig

TRIES = 32  # an image that is drawn, before its pool is listed: one of more than a few hundredths of all hardly ever is


class Draws:
    """Blocks of a source's images of one label set that see the same others, and those others.

    source: all images of the data set, whatever share of them is adapted here; others: where others are drawn from.
    A block and its draws follow from these and the seed alone, not from sharding, resuming or timing.
    """

    def __init__(self, source: Source, others: Source, config: RIBConfig, seed: int = 0):
        if others.classes != source.classes:
            raise ValueError("Draws: expected other images of the same classes as the data's")
        self.source, self.others, self.config, self.seed = source, others, config, seed
        self.steps = config.anchor_batches if config.anchored else max(1, config.steps - 1)  # that others are drawn for
        self.labels = others.labels().numpy()
        self.usable = np.flatnonzero(self.labels.any(1))  # images without classes add nothing to the loss
        sets = {}
        for number, item in enumerate(source):
            if item.classes:
                sets.setdefault(item.classes, []).append(number)
        size = config.share_others
        self.blocks = [images[i : i + size] for images in sets.values() for i in range(0, len(images), size)]
        self._words = _packed(self.labels)
        self._pools = {}  # of the last few label sets, whose blocks follow one another
        self._numbers = {item.name: number for number, item in enumerate(others)}

    def pool(self, block: Sequence[int]) -> np.ndarray:
        """The images that may be drawn: those that share no class with the block's, or all but the block's own."""
        if not self.config.disjoint:
            return self.usable[self._fit(block, self.usable)]
        classes = self.source[block[0]].classes
        if classes not in self._pools:
            if len(self._pools) >= 4:
                self._pools.pop(next(iter(self._pools)))
            self._pools[classes] = self.usable[self._fit(block, self.usable)]
        return self._pools[classes]

    def draw(self, block: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The others of each step (steps, n_others), and seeds (steps, n_others, 4) of what their crops are drawn with.

        Without replacement from step to step, until the pool has been seen whole; none, (steps, 0), where it is empty.
        """
        text = f"{self.seed} {self.source[block[0]].name}"
        generator = np.random.default_rng(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32))
        count = self.config.n_others
        seeds = generator.integers(2**32, size=(self.steps, count, 4), dtype=np.uint32)
        order = self._order(block, self.steps * count, generator)
        return order.reshape(self.steps, -1 if len(order) else 0), seeds[:, : count if len(order) else 0]

    def _order(self, block: Sequence[int], count: int, generator: np.random.Generator) -> np.ndarray:
        """The first `count` of the pool in random order, and of further such orders where it holds fewer.

        Images are drawn from all, and those that do not fit or came before are passed over: every order is as likely,
        and whether there are enough after so many tries does not depend on the order. If not, the pool is listed.
        """
        found, most = {}, len(self.usable)
        for _ in range(TRIES // 2 if TRIES * count < most else 0):
            tried = self.usable[generator.integers(most, size=2 * count)]
            found |= dict.fromkeys(tried[self._fit(block, tried)].tolist())
            if len(found) >= count:
                return np.fromiter(found, np.int64, count)
        pool = self.pool(block)
        turns = -(-count // len(pool)) if len(pool) else 0
        orders = (generator.choice(pool, min(count, len(pool)), replace=False) for _ in range(turns))
        return np.concatenate([pool[:0], *orders])[:count]

    def _fit(self, block: Sequence[int], numbers: np.ndarray) -> np.ndarray:
        """Which of these images, by number, are in the block's pool."""
        items = [self.source[number] for number in block]
        if not self.config.disjoint:
            return np.isin(numbers, [self._numbers.get(item.name, -1) for item in items], invert=True)
        own = np.zeros((1, self.labels.shape[1]), bool)
        own[0, list(items[0].classes)] = True
        shared = (word[numbers] & mine for word, mine in zip(self._words, _packed(own), strict=True))
        return functools.reduce(np.bitwise_or, shared) == 0


def _packed(labels: np.ndarray) -> np.ndarray:
    """(N, C) bool -> (C / 64, N) uint64: a bit a class."""
    padded = np.zeros((len(labels), -(-labels.shape[1] // 64) * 64), bool)
    padded[:, : labels.shape[1]] = labels
    return np.ascontiguousarray(np.packbits(padded, 1).view(np.uint64).T)
