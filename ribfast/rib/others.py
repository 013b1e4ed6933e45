"""Which other images are adapted to beside a target: drawn for each label set, the same in every run."""

import hashlib
from collections.abc import Sequence

import numpy as np

from .config import RIBConfig


class Draws:
    """Blocks of images of one label set that see the same others, and those others.

    labels: (N, C) bool, of all images of the data set, whatever share of them is adapted here; names: of the images.
    A block and its draws follow from these and the seed alone, not from sharding, resuming or timing.
    """

    def __init__(self, labels: np.ndarray, names: Sequence[str], config: RIBConfig, seed: int = 0):
        self.labels, self.names, self.config, self.seed = np.asarray(labels, bool), names, config, seed
        self.usable = np.flatnonzero(self.labels.any(1))  # images without classes add nothing to the loss
        sets = {}
        for image in self.usable:
            sets.setdefault(self.labels[image].tobytes(), []).append(int(image))
        size = config.share_others
        self.blocks = [images[i : i + size] for images in sets.values() for i in range(0, len(images), size)]
        self._pools = {}

    def pool(self, block: Sequence[int]) -> np.ndarray:
        """The images that may be drawn: those that share no class with the block's, or all but the block's own."""
        if not self.config.disjoint:
            return np.setdiff1d(self.usable, block)
        present = self.labels[block[0]]
        key = present.tobytes()
        if key not in self._pools:
            self._pools[key] = self.usable[~self.labels[self.usable][:, present].any(1)]
        return self._pools[key]

    def draw(self, block: Sequence[int], step: int) -> list[tuple[int, np.random.Generator]]:
        """The others of a step, and what their crops are drawn with; none where the pool is empty.

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
        text = f"{self.seed} {self.names[block[0]]} {what} {number}"
        return np.random.default_rng(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32))
