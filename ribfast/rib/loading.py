"""Images on their way into the engine: a block's targets and the others of its steps, read ahead by threads."""

import logging
from collections.abc import Iterator
from concurrent.futures import Executor, Future

import numpy as np
import torch
from torch import Tensor

from .. import data, files
from ..errors import lacks_memory
from .config import RIBConfig
from .job import Target
from .others import Draws

log = logging.getLogger("ribfast")


class BlockLoader:
    """The images of a block that are to be adapted, and `others` as the engine asks for them."""

    def __init__(
        self,
        draws: Draws,
        block,
        wanted,
        normalization,
        threads: Executor,
        cache: data.ImageCache,
        *,
        pin: bool = False,
        largest: int | None = None,
    ):
        """block: numbers of the draws' source, wanted: those of them that are adapted; cache: of the others.

        pin: give tensors in memory that a GPU copies from by itself. largest: the longer side that targets with a
        longer one are reduced to.
        """
        self.draws, self.normalization, self.threads = draws, normalization, threads
        self.cache, self.pin, self.largest = cache, pin, largest
        config: RIBConfig = draws.config
        self.augmentation = data.Augmentation(config.others_long_side, config.others_crop, True, normalization)
        self.items = [draws.source[number] for number in wanted]
        self.labels = torch.from_numpy(draws.labels)
        self.exists = config.n_others > 0
        self.drawn, self.seeds = draws.draw(block)
        self.empty = self.exists and not self.drawn.size
        self._pending: dict[int, tuple[list[int], Tensor, list[Future]]] = {}
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
            except Exception as error:
                if not isinstance(error, (OSError, ValueError)) and not lacks_memory(error):
                    raise
                yield item, error
            self._targets[number] = None

    def others(self, step: int) -> tuple[Tensor, Tensor]:
        """(images, present), and the next step's are begun."""
        self._submit(step)
        if step + 1 < self.draws.steps:
            self._submit(step + 1)
        chosen, images, read = self._pending.pop(step)
        readable = torch.tensor([future.result() for future in read])
        return images, self.labels[chosen] & readable[:, None]  # without classes an image adds nothing to the loss

    def _submit(self, step: int) -> None:
        if step not in self._pending:
            drawn, side = self.drawn[step].tolist(), self.augmentation.crop
            images = torch.empty(len(drawn), 3, side, side, pin_memory=self.pin)
            read = [
                self.threads.submit(self._crop, self.draws.others[image], seed, out)
                for image, seed, out in zip(drawn, self.seeds[step], images, strict=True)
            ]
            self._pending[step] = drawn, images, read

    def _target(self, item: data.Item) -> Target:
        image = self.draws.source.image(item)
        size, image = image.shape[:2], data.reduce_to(image, self.largest)
        views = data.make_views(image, self.draws.config.scales, self.normalization)
        views = [view.pin_memory() for view in views] if self.pin else views
        return Target(views, list(item.classes), size, image.shape[:2] if image.shape[:2] != size else None)

    def _crop(self, item: data.Item, seed: np.ndarray, out: Tensor) -> bool:
        """Whether the image can be read; one that cannot must not stop those that are adapted beside it. Where memory
        lacks, what is cached makes room, once."""
        for is_last in (False, True):
            try:
                out.copy_(self.augmentation(self.cache.image(item), np.random.default_rng(seed)))
                return True
            except Exception as error:
                lacks = lacks_memory(error)
                if not lacks and not isinstance(error, (OSError, ValueError)):
                    raise
                if is_last or not lacks:
                    log.warning("%s, drawn as another image, is left out: %s", item.name, files.first_line(error))
                    break
            self.cache.clear()
        out.zero_()
        return False
