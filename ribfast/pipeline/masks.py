"""Masks of class maps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import data, masks, models
from ..processes import choose_device, choose_shard
from ..store import Maps, Store, enlarged
from .stage import Made, label_all

PIXELS = 2**22  # of images whose masks are made at once, beyond the first: memory is in proportion to them


@dataclass(frozen=True)
class MasksConfig(masks.MaskConfig):
    """A method's constants, and how it is put to work."""

    batch: int = 8  # images at a time
    shard: str | None = None  # i/n: the i-th of n shares alone, from 0; none: all, with whoever shares OUT
    workers: int = 2  # threads that decode
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def __post_init__(self):
        super().__post_init__()
        if self.batch < 1 or self.workers < 0:
            raise ValueError(f"MasksConfig: expected batch of at least 1 and workers of at least 0, got {self.batch} "
                             f"and {self.workers}")  # fmt: skip
        choose_shard(self.shard)


def make_masks(
    source: data.Source,
    maps: Store,
    store: Store,
    config: MasksConfig | None = None,
    *,
    network: models.IRNet | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Made:
    """A mask of each image, from its class maps, into the store (which may be the maps' own).

    Masks that are there already are left alone. Images without classes are background. What cannot be read or has no
    maps is recorded as a failure and does not stop the others. network: IRN's, for method irn.
    """
    config = config or MasksConfig.crf()
    device = choose_device(config.device)
    if config.method == "irn" and network is None:
        raise ValueError("make_masks: expected IRN's network for method irn, got none; train it first (train-irn)")
    network = None if network is None else network.to(device, memory_format=torch.channels_last).eval()
    walks, without_classes = config.method == "irn", set()

    def load(item: data.Item) -> tuple[np.ndarray, Maps | None]:
        image = source.image(item)
        if not item.classes:
            return image, None
        own = maps.read(item.name)  # enlarged later: many are read ahead
        if walks and own.cam is None:
            raise ValueError("expected maps at a quarter of the photograph's size, which walk, got PMM's file")
        if not walks and tuple(own.size) != image.shape[:2]:
            raise ValueError(f"expected maps of the photograph's {image.shape[:2]} pixels, got {tuple(own.size)}; "
                             f"make them again")  # fmt: skip
        if not {*own.keys.tolist()} <= {*item.classes}:
            raise ValueError(f"expected maps of the photograph's classes {item.classes}, got "
                             f"{own.keys.tolist()}; they are another data set's")  # fmt: skip
        return image, own

    def masked(ready: list[tuple[np.ndarray, Maps]]) -> list[Tensor]:
        images, own = [image for image, _ in ready], [maps for _, maps in ready]
        cams = [each.cam.float().to(device) if walks else None for each in own]
        large = [None if walks else torch.from_numpy(enlarged(each).high_res).to(device) for each in own]
        return masks.make_masks(images, cams, large, [each.keys.tolist() for each in own], config, network)

    def label(block: list[tuple]) -> list[Tensor]:
        """Images without classes are background."""
        without_classes.update(item.name for item, (_, own) in block if own is None)
        found = (mask for some in _by_pixels([loaded for _, loaded in block if loaded[1] is not None])
                 for mask in masked(some))  # fmt: skip
        return [torch.zeros(image.shape[:2], dtype=torch.uint8) if own is None else next(found)
                for _, (image, own) in block]  # fmt: skip

    result = label_all(source, store, config, load, label, progress, together=False)
    result.without_classes = len(without_classes)
    return result


def _by_pixels(ready: list[tuple[np.ndarray, Maps]]) -> Iterator[list[tuple[np.ndarray, Maps]]]:
    """In groups, each of PIXELS at most, or of one image."""
    group, pixels = [], 0
    for image, own in ready:
        size = image.shape[0] * image.shape[1]
        if group and pixels + size > PIXELS:
            yield group
            group, pixels = [], 0
        group.append((image, own))
        pixels += size
    if group:
        yield group
