"""Images on their way into the engine: a block's targets and the others of its steps, read ahead by threads."""

import logging
from collections.abc import Iterator
from concurrent.futures import Executor, Future

import numpy as np
import torch
from torch import Tensor

from .. import data
from .config import RIBConfig
from .engine import Target
from .others import Draws

log = logging.getLogger("ribfast")


class BlockLoader:
    """The images of a block that are to be adapted, and `others` as the engine asks for them."""

    def __init__(self, draws: Draws, block, wanted, normalization, threads: Executor, cache: data.ImageCache):
        """block: numbers of the draws' source, wanted: those of them that are adapted; cache: of the others."""
        self.draws, self.block, self.normalization, self.threads = draws, block, normalization, threads
        self.cache = cache
        config: RIBConfig = draws.config
        self.augmentation = data.Augmentation(config.others_long_side, config.others_crop, True, normalization)
        self.items = [draws.source[number] for number in wanted]
        self.labels = torch.from_numpy(draws.labels)
        self.exists = config.n_others > 0
        self.empty = self.exists and not len(draws.pool(block))
        self._pending: dict[int, list[Future]] = {}
        self._targets = []
        if not self.empty:
            self._targets = [threads.submit(self._target, item) for item in self.items[:2]]
            if self.exists:
                self._submit(0)

    def targets(self) -> Iterator[tuple[data.Item, Target | Exception]]:
        """Each image, or why it cannot be read."""
        for number, item in enumerate(self.items):
            if number + 2 < len(self.items):
                self._targets.append(self.threads.submit(self._target, self.items[number + 2]))
            try:
                yield item, self._targets[number].result()
            except (OSError, ValueError) as error:
                yield item, error
            self._targets[number] = None

    def others(self, step: int) -> tuple[Tensor, Tensor]:
        """(images, present), and the next step's are begun."""
        config = self.draws.config
        self._submit(step)
        if step + 1 < (config.anchor_batches if config.anchored else config.steps - 1):
            self._submit(step + 1)
        chosen, crops = self._pending.pop(step)
        crops, present = [crop.result() for crop in crops], self.labels[chosen]
        for number, crop in enumerate(crops):
            if crop is None:  # without classes it adds nothing to the loss
                crops[number], present[number] = torch.zeros(3, *[self.augmentation.crop] * 2), False
        return torch.stack(crops), present

    def _submit(self, step: int) -> None:
        if step not in self._pending:
            drawn = self.draws.draw(self.block, step)
            crops = [self.threads.submit(self._crop, self.draws.others[image], generator) for image, generator in drawn]
            self._pending[step] = [image for image, _ in drawn], crops

    def _target(self, item: data.Item) -> Target:
        image = self.draws.source.image(item)
        views = data.make_views(image, self.draws.config.scales, self.normalization)
        return Target(views, list(item.classes), image.shape[:2])

    def _crop(self, item: data.Item, generator: np.random.Generator) -> Tensor | None:
        """None where the image cannot be read, which must not stop those that are adapted beside it."""
        try:
            return self.augmentation(self.cache.image(item), generator)
        except (OSError, ValueError) as error:
            log.warning("%s, drawn as another image, is left out: %s", item.name, error)
            return None
