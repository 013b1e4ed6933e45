"""Which other images are adapted to beside a target: drawn for each label set, the same in every run."""

import hashlib
from collections.abc import Sequence

import numpy as np

from ..data import Source
from .config import RIBConfig


class Draws:
    """Blocks of a source's images of one label set that see the same others, and those others.

    source: all images of the data set, whatever share of them is adapted here; others: where others are drawn from.
    A block and its draws follow from these and the seed alone, not from sharding, resuming or timing.
    """

    def __init__(self, source: Source, others: Source, config: RIBConfig, seed: int = 0):
        if others.classes != source.classes:
            raise ValueError("Draws: expected other images of the same classes as the data's")
        self.source, self.others, self.config, self.seed = source, others, config, seed
        self.labels = others.labels().numpy()
        self.usable = np.flatnonzero(self.labels.any(1))  # images without classes add nothing to the loss
        sets = {}
        for number, item in enumerate(source):
            if item.classes:
                sets.setdefault(item.classes, []).append(number)
        size = config.share_others
        self.blocks = [images[i : i + size] for images in sets.values() for i in range(0, len(images), size)]
        self._pools = {}  # of the last few label sets, whose blocks follow one another
        self._numbers = {item.name: number for number, item in enumerate(others)}

    def pool(self, block: Sequence[int]) -> np.ndarray:
        """The images that may be drawn: those that share no class with the block's, or all but the block's own."""
        if not self.config.disjoint:
            own = [self._numbers.get(self.source[number].name, -1) for number in block]
            return np.setdiff1d(self.usable, own)
        classes = self.source[block[0]].classes
        if classes not in self._pools:
            if len(self._pools) >= 4:
                self._pools.pop(next(iter(self._pools)))
            self._pools[classes] = self.usable[~self.labels[self.usable][:, list(classes)].any(1)]
        return self._pools[classes]

    def draw(self, block: Sequence[int], step: int) -> list[tuple[int, np.random.Generator]]:
        """The numbers of the others of a step, and what their crops are drawn with; none where the pool is empty.

        Without replacement from step to step, until the pool has been seen whole.
        """
        pool = self.pool(block)
        if not len(pool):
            return []
        count, chosen = self.config.n_others, []
        for place in range(step * count, (step + 1) * count):
            turn, index = divmod(place, len(pool))
            if index == 0 or not chosen:
                order = self._generator(block, "order", turn).permutation(len(pool))
            chosen.append(int(pool[order[index]]))
        return [(image, self._generator(block, "crop", step * count + i)) for i, image in enumerate(chosen)]

    def _generator(self, block: Sequence[int], what: str, number: int) -> np.random.Generator:
        text = f"{self.seed} {self.source[block[0]].name} {what} {number}"
        return np.random.default_rng(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32))
