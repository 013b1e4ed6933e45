"""RIB's class maps, of a classifier that is adapted to each image."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .. import data, models, rib
from ..cams import strided_cams
from ..processes import choose_device, choose_shard
from ..rib import RIBConfig
from ..store import Store
from .stage import Clock, Failure, Made, Stage, check_classes, failure_of, keep_maps, own_share


@dataclass(frozen=True)
class AdaptConfig(RIBConfig):
    """RIB's constants, and how they are put to work."""

    seed: int = 0  # of the others that are drawn
    # longer side of the largest photographs that are computed as they are; larger ones are reduced to it first, and
    # their maps enlarged; none: no bound
    largest: int | None = 1024
    steps_kept: bool = False  # keep the maps after each step too, in 8 bits, as the report shows them
    format: Literal["npz", "irn", "pmm"] = "npz"  # of the files
    high_res: bool = False  # keep maps of the photograph's size in npz files too, not only at a quarter of it
    shard: str | None = None  # i/n: the i-th of n shares alone, from 0; none: all, with whoever shares OUT
    workers: int | None = None  # threads that decode; none: 2, or, for a GPU, one for each core of its share, up to 16
    cache_mib: int = 1024  # of decoded images that are kept
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def __post_init__(self):
        super().__post_init__()
        if (self.workers is not None and self.workers < 1) or self.cache_mib < 0:
            raise ValueError(f"AdaptConfig: expected workers of at least 1 and cache_mib of at least 0, got "
                             f"{self.workers} and {self.cache_mib}")  # fmt: skip
        if self.largest is not None and self.largest < 1:
            raise ValueError(f"AdaptConfig: expected largest of at least 1, or none, got {self.largest}")
        choose_shard(self.shard)


def adapt_maps(
    source: data.Source,
    model: models.CamClassifier,
    store: Store,
    config: AdaptConfig | None = None,
    *,
    others: data.Source | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Made:
    """RIB's class maps of each image's classes into the store, as they are done.

    The other images that an image is adapted with follow from the data set, the seed and the image alone, so the maps
    do not depend on shards, on what the store holds already, or on timing. What cannot be adapted is recorded as a
    failure.
    others: where they are drawn from; None: from the source itself.
    """
    config = config or AdaptConfig.released()
    check_classes("adapt_maps", source, model)
    device, clock = choose_device(config.device), Clock()
    model = model.to(device, memory_format=torch.channels_last).eval()
    engine = rib.Engine(model, config)
    draws = rib.Draws(source, source if others is None else others, config, config.seed)
    skipped = own_share([number for number, item in enumerate(source) if not item.classes], config)
    cache, normalization = (
        data.ImageCache(draws.others, config.cache_mib << 20),
        data.NORMALIZATIONS[model.normalization],
    )

    def loaders(begun: Iterator) -> Iterator[rib.BlockLoader]:
        for block, wanted in begun:
            try:
                loader = rib.BlockLoader(draws, block, wanted, normalization, threads, cache, largest=config.largest,
                                         pin=device.type == "cuda")  # fmt: skip
            except Exception as error:
                failure = failure_of(error)
                for number in wanted:
                    stage.end(source[number].name, failure)
                continue
            yield loader

    def jobs(begun: Iterator) -> Iterator[rib.Job]:
        for loader in _one_ahead(loaders(begun)):
            if loader.empty:
                reason = "every other image shares a class with it; use --no-disjoint, or more images"
                for item in loader.items:
                    stage.end(item.name, Failure(reason))
                continue
            others = loader.others if loader.exists else None
            batches = engine.batches(loader.items[0].classes, others, len(loader.items))
            for item, target in loader.targets():
                if isinstance(target, Exception):
                    stage.end(item.name, failure_of(target, OSError, ValueError))
                else:
                    yield rib.Job(target, batches, item, _Steps(target) if config.steps_kept else None)

    def results(begun: Iterator) -> Iterator[tuple[str, rib.Result, np.ndarray | None]]:
        """On the CPU, before another thread has them."""
        for job, found in engine.adapt_all(jobs(begun)):
            steps = None
            if found.error is None:
                found = dataclasses.replace(found, maps=[], cam=found.cam.cpu(), high_res=found.high_res.cpu())
                steps = None if job.watch is None else job.watch.first(found.steps)
            yield job.tag.name, found, steps

    def save(made: tuple[str, rib.Result, np.ndarray | None]) -> tuple[str, Failure | None]:
        name, found, steps = made
        if found.error is not None:
            return name, Failure(found.error, found.lacks_memory)
        try:
            if steps is not None:  # before the maps, as the facts
                store.save_steps(name, found.keys, steps)
            facts = {"steps": found.steps, "stopped": found.stopped, **clock.facts()}
            keep_maps(store, name, found.keys, found.cam, found.high_res, **facts)
            stage.mend(name)
        except Exception as unfit:
            return name, failure_of(unfit, ValueError)
        return name, None

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes on this machine
    workers = config.workers or (2 if device.type == "cpu" else max(2, min(16, cores)))
    threads = ThreadPoolExecutor(workers, "ribfast-rib")
    blocks = own_share(draws.blocks, config)
    try:
        with Stage(source, store, "maps", blocks, config, progress, skipped) as stage:
            for begun in stage.rounds():
                if stage.alone:
                    cache.clear()
                with rib.keep_pages():
                    for name, failure in data.prefetch(save, results(begun), workers=1, ahead=1):
                        stage.end(name, failure)
    finally:
        threads.shutdown(cancel_futures=True)
    return stage.result


class _Steps:
    """An image's maps after each step, as they are shown to it, in 8 bits on the device that makes them."""

    def __init__(self, target: rib.Target):
        self.keys, self.size, self.shown = sorted(target.classes), target.size, []

    def __call__(self, step: int, maps: list[Tensor]) -> None:
        cam = strided_cams([scale[None, self.keys] for scale in maps], self.size)
        self.shown[step:] = [cam.mul_(255).round_().to(torch.uint8)]  # from 0 again where the image begins anew

    def first(self, count: int) -> np.ndarray:
        return torch.stack(self.shown[:count]).cpu().numpy()


def _one_ahead(things: Iterator) -> Iterator:
    """Each thing after the next one has been made."""
    held = next(things, None)
    while held is not None:
        coming = next(things, None)
        yield held
        held = coming
