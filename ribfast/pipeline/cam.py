"""Class activation maps of a trained classifier."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from .. import data, models
from ..cams import CROP_SCALES, merge_cams, multi_crop_cams, shrink_cams
from ..config import AnotherRun
from ..processes import choose_device, choose_shard
from ..store import Store
from .stage import Clock, Made, Stage, check_classes, failure_of, first_few, keep_maps, own_share, save_all


@dataclass(frozen=True)
class CamConfig:
    """The defaults are IRN's and RIB's."""

    scales: tuple[float, ...] = (1.0, 0.5, 1.5, 2.0)  # each of the original photograph, with its mirror
    crop: int = 0  # PMM's: each scale in overlapping crops of this side, without mirrors; 0: whole
    stride: int = 300  # from one crop to the next
    # longer side of the largest photographs that are computed as they are; larger ones are reduced to it first, and
    # their maps enlarged; none: no bound
    largest: int | None = 1024
    precision: Literal["float32", "bfloat16"] = "float32"  # of the network; maps are merged in float32
    format: Literal["npz", "irn", "pmm"] = "npz"  # of the files
    high_res: bool = False  # keep maps of the photograph's size in npz files too, not only at a quarter of it
    shard: str | None = None  # i/n: the i-th of n shares alone, from 0; none: all, with whoever shares OUT
    workers: int = 2  # threads that decode
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def __post_init__(self):
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"CamConfig: expected scales above 0, got {self.scales}")
        if self.crop and not 0 < self.stride <= self.crop:
            raise ValueError(f"CamConfig: expected 0 < stride <= crop, got stride {self.stride} and crop {self.crop}")
        if self.workers < 0 or (self.largest is not None and self.largest < 1):
            raise ValueError(f"CamConfig: expected workers of at least 0 and largest of at least 1, or none, got "
                             f"{self.workers} and {self.largest}")  # fmt: skip
        choose_shard(self.shard)

    @classmethod
    def released(cls) -> "CamConfig":
        return cls()

    @classmethod
    def pmm(cls) -> "CamConfig":
        return cls(scales=CROP_SCALES, crop=448)


def make_cams(
    source: data.Source,
    model: models.CamClassifier,
    store: Store,
    config: CamConfig | None = None,
    *,
    keep: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Made:
    """Class activation maps of each image's classes, merged over scales and mirrors, into the store.

    What is there already is left alone, so a run that was cut off goes on; unless maps there are of other classes than
    their image's, which is an error if not keep. An image that cannot be read is recorded
    as a failure and does not stop the others; it is tried again the next time. One without classes is recorded as
    skipped in the store's metrics.
    """
    config = config or CamConfig()
    check_classes("make_cams", source, model)
    if not keep:
        _refuse_other_labels(source, store)
    device, clock = choose_device(config.device), Clock()
    model = model.to(device, memory_format=torch.channels_last).eval()
    units = own_share([(number,) for number, item in enumerate(source) if item.classes], config)
    skipped = own_share([number for number, item in enumerate(source) if not item.classes], config)

    def load(number: int) -> tuple:
        """(item, failure, sizes: the photograph's and that it was reduced to, what the network sees)"""
        item = source[number]
        try:
            image = source.image(item)
            size, image = image.shape[:2], data.reduce_to(image, config.largest)
            reduced = image.shape[:2] if image.shape[:2] != size else None
            if not config.crop:
                image = data.make_views(image, config.scales, data.NORMALIZATIONS[model.normalization])
            return item, None, (size, reduced), image
        except Exception as error:
            return item, failure_of(error, OSError, ValueError), None, None

    def maps(numbers: Iterator[int]) -> Iterator[tuple]:
        for item, failure, sizes, seen in data.prefetch(load, numbers, workers=config.workers,
                                                       ahead=max(2, config.workers)):  # fmt: skip
            if failure is not None:
                yield item, failure
                continue
            try:
                if config.crop:
                    found = _crop_cams(model, seen, item.classes, sizes[0], config)
                else:
                    found = _cams(model, seen, item.classes, sizes, device, config.precision)
            except Exception as error:
                yield item, failure_of(error, ValueError, RuntimeError)
                continue
            yield item, None, *found

    def save(item: data.Item, cam, high_res) -> None:
        keep_maps(store, item.name, item.classes, cam, high_res, classes=list(item.classes), **clock.facts())

    with Stage(source, store, "maps", units, config, progress, skipped) as stage:
        for begun in stage.rounds():
            save_all(stage, maps(number for _, left in begun for number in left), save, ahead=4)
    return stage.result


def _refuse_other_labels(source: data.Source, store: Store) -> None:
    """Whose maps would be taken for those of the images: labels that have changed since, or another data set."""
    known = store.metrics()
    other = [item.name for item in source if item.name in known
             and known[item.name].get("classes", list(item.classes)) != list(item.classes)
             and item.name in store]  # fmt: skip
    if other:
        raise AnotherRun(f"make_cams: expected maps of the classes that images are labelled with, got others of "
                         f"{first_few(other)} in {store.folder}; choose another folder, say --overwrite to make all "
                         f"anew, or --keep to leave them as they are", [f"labels of {first_few(other)}"])  # fmt: skip


@torch.inference_mode()
def _cams(model, views, classes, sizes, device, precision):
    maps = []
    for view in views:
        view = view.to(device, memory_format=torch.channels_last, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            maps.append(model(view).float())
    return merge_cams(maps, classes, *sizes)


def _crop_cams(model, image, classes, size, config: CamConfig):
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        high_res = multi_crop_cams(model, image, classes, scales=config.scales, crop=config.crop, stride=config.stride,
                                   size=size)  # fmt: skip
    return shrink_cams(high_res), high_res
