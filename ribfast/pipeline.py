"""The stages in order: each a function of data, a configuration and a store."""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import operator
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import config as configuration
from . import data, files, masks, models, ops, rib, train
from .cams import CROP_SCALES, merge_cams, multi_crop_cams, shrink_cams, strided_cams
from .claims import Work
from .metrics import Confusion, Counts, PerImage, ThresholdSweep, bootstrap_interval
from .processes import choose_device, choose_shard, processes, together
from .rib import RIBConfig
from .segment import label_probabilities
from .store import CLAIMS, Maps, Store

log = logging.getLogger("ribfast")
LACKING = (ValueError, RuntimeError, MemoryError)  # what an image raises that cannot be made; a lack of memory any


@dataclass(frozen=True)
class CamConfig:
    """The defaults are IRN's and RIB's."""

    scales: tuple[float, ...] = (1.0, 0.5, 1.5, 2.0)  # each of the original photograph, with its mirror
    crop: int = 0  # PMM's: each scale in overlapping crops of this side, without mirrors; 0: whole
    stride: int = 300  # from one crop to the next
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
        if self.workers < 0:
            raise ValueError(f"CamConfig: expected workers of at least 0, got {self.workers}")
        choose_shard(self.shard)

    @classmethod
    def released(cls) -> "CamConfig":
        return cls()

    @classmethod
    def pmm(cls) -> "CamConfig":
        return cls(scales=CROP_SCALES, crop=448)


def check_classes(stage: str, source: data.Source, model: models.CamClassifier | models.Segmenter) -> None:
    """Refuses a network of other classes than the data's."""
    if model.n_classes != len(source.classes) or model.classes not in (None, source.classes):
        has, kind = _some(model.classes) if model.classes else model.n_classes, model.kind
        raise ValueError(f"{stage}: expected a {kind} of the data's classes ({_some(source.classes)}), got one "
                         f"of {has}; train one on this data")  # fmt: skip


@dataclass
class Made:
    """What became of the images, or of a share of them."""

    made: int = 0
    kept: int = 0  # were in the store
    without_classes: int = 0
    elsewhere: int = 0  # made meanwhile by other processes
    failed: dict[str, str] = dataclasses.field(default_factory=dict)  # why, by name, in any process


class _Stage:
    """A source's images on their way into a store, in units that this process and others beside it take up.

    what: "maps" or "masks" are made. units: numbers of images that are made together. skipped: those without classes.
    """

    def __init__(
        self, source: data.Source, store: Store, what: str, units: Sequence[Sequence[int]], config,
        progress: Callable[[int, int, str], None] | None, skipped: Sequence[int] = (),
    ):  # fmt: skip
        self.source, self.store, self.progress = source, store, progress
        self.is_there, self.place = {
            "maps": (store.__contains__, store.path), "masks": (store.has_mask, store.mask_path)
        }[what]  # fmt: skip
        self._facts, self._reasons = store.follow()
        names = [source[number].name for unit in units for number in unit]
        self._missing = {name for name in names if not self.is_there(name)}
        units = [unit for unit in units if any(source[number].name in self._missing for number in unit)]
        self.result = Made(kept=len(names) - len(self._missing), without_classes=len(skipped))
        self.total = len(names) + len(skipped)
        self._failures, self._unit, self._open = store.failures(), {}, {}
        self._mine, self._elsewhere, self._failed = set(), set(), {}
        (index, count), known = choose_shard(config.shard), store.metrics()
        for number in skipped if config.shard is not None or index == 0 else ():
            name = source[number].name
            if known.get(name) != {"skipped": "no classes"}:
                store.record(name, skipped="no classes")
        self.work = Work(
            store.folder / CLAIMS, units, lambda unit: f"{what} {source[unit[0]].name}", self._left,
            (0, 1) if config.shard is not None else (index, count),
        )  # fmt: skip

    def __enter__(self) -> "_Stage":
        return self

    def __exit__(self, kind, *exception) -> None:
        self.work.close()
        if kind is None:
            self._look()
            if self._elsewhere or not (self.result.made or self.result.failed):
                self._report("")
            self.result.elsewhere = len(self._elsewhere - self._failed.keys())
            self.result.failed = self._failed | self.result.failed

    def rounds(self) -> Iterator[Iterator[tuple[Sequence[int], list[int]]]]:
        """Units, with the images of them that are to be made; each of these is to `end` before the next round."""
        for units in self.work.rounds():
            yield self._begun(units)

    def end(self, name: str, error: str | None = None) -> None:
        """An image is in the store, or cannot be."""
        if error is None:
            self.result.made += 1
        else:
            self.result.failed[name] = error
            log.warning("%s: %s", name, error)
        unit = self._unit.pop(name)
        self._open[unit] -= 1
        if not self._open[unit]:
            del self._open[unit]
            self.work.release(unit)
        self._report(name)

    def mend(self, name: str) -> None:
        """What had failed has been made."""
        if name in self._failures:
            self.store.fail(name, None)

    def _begun(self, units: Iterator) -> Iterator:
        for unit, left in units:
            unit = tuple(unit)
            self._open[unit] = len(left)
            names = [self.source[number].name for number in left]
            self._unit |= dict.fromkeys(names, unit)
            self._mine |= {*names}
            self._elsewhere -= {*names}  # whoever recorded them died before they were there
            yield unit, left

    def _left(self, unit: Sequence[int]) -> list[int]:
        named = [(number, self.source[number].name) for number in unit]
        left = [(number, name) for number, name in named if not self.is_there(name)]
        if left:
            self._look()
        for _, name in left:
            if name in self._elsewhere:  # a network's file system may remember that it was not there
                with contextlib.suppress(FileNotFoundError):
                    os.listdir(self.place(name).parent)
        return [number for number, name in left if name not in self._failed and not self.is_there(name)]

    def _look(self) -> None:
        """What became of images elsewhere."""
        failures = [facts for facts in self._reasons.read() if facts.get("error") is not None]
        for facts in (*self._facts.read(), *failures):
            name = facts.get("name")
            if name in self._missing and name not in self._mine:
                self._elsewhere.add(name)
                if "error" in facts:
                    self._failed[name] = facts["error"]

    def _report(self, name: str) -> None:
        if self.progress is not None:
            self._look()
            own = self.result.made + len(self.result.failed)
            done = own + self.result.kept + self.result.without_classes + len(self._elsewhere)
            self.progress(min(done, self.total), self.total, name)


def make_cams(
    source: data.Source,
    model: models.CamClassifier,
    store: Store,
    config: CamConfig | None = None,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> Made:
    """Class activation maps of each image's classes, merged over scales and mirrors, into the store.

    What is there already is left alone, so a run that was cut off goes on. An image that cannot be read is recorded
    as a failure and does not stop the others; it is tried again the next time. One without classes is recorded as
    skipped in the store's metrics.
    """
    config = config or CamConfig()
    check_classes("make_cams", source, model)
    device, start = choose_device(config.device), time.perf_counter()
    model = model.to(device, memory_format=torch.channels_last).eval()
    units = _share([(number,) for number, item in enumerate(source) if item.classes], config)
    skipped = _share([number for number, item in enumerate(source) if not item.classes], config)

    def load(number: int):
        item = source[number]
        try:
            image = source.image(item)
        except (OSError, ValueError) as error:
            return item, None, str(error)
        if config.crop:
            return item, image.shape[:2], image
        return item, image.shape[:2], data.make_views(image, config.scales, data.NORMALIZATIONS[model.normalization])

    def maps(numbers: Iterator[int]) -> Iterator[tuple]:
        for item, size, views in data.prefetch(load, numbers, workers=config.workers, ahead=max(2, config.workers)):
            if size is None:
                yield item, views
                continue
            try:
                if config.crop:
                    found = _crop_cams(model, views, item.classes, config)
                else:
                    found = _cams(model, views, item.classes, size, device, config.precision)
            except LACKING as error:
                yield item, _reason(error)
                continue
            yield item, None, *found

    def keep(item: data.Item, cam, high_res) -> None:
        _keep(store, item.name, item.classes, cam, high_res, seconds=_since(start))

    with _Stage(source, store, "maps", units, config, progress, skipped) as stage:
        for begun in stage.rounds():
            _save_all(stage, maps(number for _, left in begun for number in left), keep, ahead=4)
    return stage.result


def _share(things: list, config) -> list:
    """Those of this process alone, where its configuration says so."""
    if config.shard is None:
        return things
    index, count = choose_shard(config.shard)
    return things[index::count]


def _save_all(stage: _Stage, made: Iterator[tuple], keep: Callable, *, ahead: int) -> None:
    """`keep` of each (item, error, what was made of it), by a thread of its own; where there is an error, a failure."""

    def save(one: tuple) -> tuple[str, str | None]:
        item, error, *found = one
        if error is None:
            try:
                keep(item, *found)
                stage.mend(item.name)
            except ValueError as unfit:  # what was made
                error = str(unfit)
        if error is not None:
            stage.store.fail(item.name, error)
        return item.name, error

    for name, error in data.prefetch(save, made, workers=1, ahead=ahead):
        stage.end(name, error)


def _reason(error: Exception) -> str:
    """Of an image that cannot be made; what was taken for it is free for the next."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return (str(error).splitlines() or [type(error).__name__])[0]


def _keep(store: Store, name: str, keys, cam, high_res, **facts) -> None:
    """Facts before maps: an image with maps is not made again, so its facts would be missing for good."""
    store.record(name, **facts)
    store.save(name, keys, cam, high_res)


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 3)


@torch.inference_mode()
def _cams(model, views, classes, size, device, precision):
    maps = []
    for view in views:
        view = view.to(device, memory_format=torch.channels_last, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            maps.append(model(view).float())
    return merge_cams(maps, classes, size)


def _crop_cams(model, image, classes, config: CamConfig):
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        high_res = multi_crop_cams(model, image, classes, scales=config.scales, crop=config.crop, stride=config.stride)
    return shrink_cams(high_res), high_res


@dataclass(frozen=True)
class AdaptConfig(RIBConfig):
    """RIB's constants, and how they are put to work."""

    seed: int = 0  # of the others that are drawn
    steps_kept: bool = False  # keep the maps after each step too, in 8 bits, as the report shows them
    format: Literal["npz", "irn", "pmm"] = "npz"  # of the files
    high_res: bool = False  # keep maps of the photograph's size in npz files too, not only at a quarter of it
    shard: str | None = None  # i/n: the i-th of n shares alone, from 0; none: all, with whoever shares OUT
    workers: int | None = None  # threads that decode; None: 2, or, for a GPU, one for each core of its share, up to 16
    cache_mib: int = 1024  # of decoded images that are kept
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def __post_init__(self):
        super().__post_init__()
        if (self.workers is not None and self.workers < 1) or self.cache_mib < 0:
            raise ValueError(f"AdaptConfig: expected workers of at least 1 and cache_mib of at least 0, got "
                             f"{self.workers} and {self.cache_mib}")  # fmt: skip
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
    device, start = choose_device(config.device), time.perf_counter()
    model = model.to(device, memory_format=torch.channels_last).eval()
    engine = rib.Engine(model, config)
    draws = rib.Draws(source, source if others is None else others, config, config.seed)
    skipped = _share([number for number, item in enumerate(source) if not item.classes], config)
    cache, normalization = (
        data.ImageCache(draws.others, config.cache_mib << 20),
        data.NORMALIZATIONS[model.normalization],
    )

    def fail(name: str, error: str) -> None:
        store.fail(name, error)
        stage.end(name, error)

    def loaders(begun: Iterator) -> Iterator[rib.BlockLoader]:
        for block, wanted in begun:
            yield rib.BlockLoader(draws, block, wanted, normalization, threads, cache, pin=device.type == "cuda")

    def jobs(begun: Iterator) -> Iterator[rib.Job]:
        for loader in _one_ahead(loaders(begun)):
            if loader.empty:
                for item in loader.items:
                    fail(item.name, "every other image shares a class with it; use --no-disjoint, or more images")
                continue
            others = loader.others if loader.exists else None
            batches = engine.batches(loader.items[0].classes, others, len(loader.items))
            for item, target in loader.targets():
                if isinstance(target, Exception):
                    fail(item.name, str(target))
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

    def save(made: tuple[str, rib.Result, np.ndarray | None]) -> tuple[str, str | None]:
        name, found, steps = made
        if found.error is None:
            if steps is not None:  # before the maps, as the facts
                store.save_steps(name, found.keys, steps)
            facts = {"steps": found.steps, "stopped": found.stopped, "seconds": _since(start)}
            try:
                _keep(store, name, found.keys, found.cam, found.high_res, **facts)
                stage.mend(name)
            except ValueError as unfit:
                return name, str(unfit)
        return name, found.error

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes on this machine
    workers = config.workers or (2 if device.type == "cpu" else max(2, min(16, cores)))
    threads = ThreadPoolExecutor(workers, "ribfast-rib")
    blocks = _share(draws.blocks, config)
    try:
        with _Stage(source, store, "maps", blocks, config, progress, skipped) as stage:
            for begun in stage.rounds():
                with rib.keep_pages():
                    for name, error in data.prefetch(save, results(begun), workers=1, ahead=1):
                        stage.end(name) if error is None else fail(name, error)
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
        own = maps.read(item.name) if walks else maps.load(item.name)
        if walks and own.cam is None:
            raise ValueError("expected maps at a quarter of the photograph's size, which walk, got PMM's file")
        if not walks and own.high_res.shape[1:] != image.shape[:2]:
            raise ValueError(f"expected maps of the photograph's {image.shape[:2]} pixels, got "
                             f"{own.high_res.shape[1:]}; make them again")  # fmt: skip
        if not {*own.keys.tolist()} <= {*item.classes}:
            raise ValueError(f"expected maps of the photograph's classes {item.classes}, got "
                             f"{own.keys.tolist()}; they are another data set's")  # fmt: skip
        return image, own

    def label(block: list[tuple]) -> list[Tensor]:
        """Images without classes are background."""
        without_classes.update(item.name for item, (_, own) in block if own is None)
        ready = [loaded for _, loaded in block if loaded[1] is not None]
        images, own = [image for image, _ in ready], [maps for _, maps in ready]
        cams = [each.cam.float().to(device) if walks else None for each in own]
        large = [None if walks else torch.from_numpy(each.high_res).to(device) for each in own]
        keys = [each.keys.tolist() for each in own]
        found = iter(masks.make_masks(images, cams, large, keys, config, network) if ready else ())
        return [torch.zeros(image.shape[:2], dtype=torch.uint8) if own is None else next(found)
                for _, (image, own) in block]  # fmt: skip

    result = _label_all(source, store, config, load, label, progress, together=False)
    result.without_classes = len(without_classes)
    return result


@dataclass(frozen=True)
class PredictConfig:
    """The defaults are one pass over the photograph and one over its mirror."""

    scales: tuple[float, ...] = (1.0,)  # of the photograph; probabilities are averaged over them
    mirror: bool = True  # each scale's mirror too
    window: int = 0  # scales are computed in overlapping windows of this side; 0: whole
    stride: int = 0  # from one window to the next; 0: two thirds of a window
    crf: bool = False  # refine the probabilities by a dense CRF
    gaussian: tuple[float, float] | None = (1.0, 3.0)  # of crf: pixels, strength
    bilateral: tuple[float, float, float] | None = (67.0, 3.0, 4.0)  # of crf: pixels, colours, strength
    iterations: int = 10  # of crf
    known: bool = False  # no labels but background and the classes that the data names for the photograph
    # longer side of the largest photographs that are computed as they are; larger ones are reduced to it first, and
    # their masks enlarged
    largest: int = 1024
    precision: Literal["float32", "bfloat16"] = "float32"  # of the network; probabilities are float32
    batch: int = 4  # images at a time; those of one size go through the network together
    shard: str | None = None  # i/n: the i-th of n shares alone, from 0; none: all, with whoever shares OUT
    workers: int = 2  # threads that decode
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def __post_init__(self):
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"PredictConfig: expected scales above 0, got {self.scales}")
        if self.window < 0 or not 0 <= self.stride <= max(self.window, 0):
            raise ValueError(f"PredictConfig: expected a window of at least 0 and a stride of at most that, got "
                             f"{self.window} and {self.stride}")  # fmt: skip
        for name, least in {"batch": 1, "largest": 1, "workers": 0, "iterations": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"PredictConfig: expected {name} of at least {least}, got {getattr(self, name)}")
        choose_shard(self.shard)

    @classmethod
    def single(cls) -> "PredictConfig":
        return cls()

    @classmethod
    def multi(cls) -> "PredictConfig":
        """DeepLab's and PMM's tests: six scales, mirrors, CRF."""
        return cls(scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), crf=True)


def predict_masks(
    source: data.Source,
    model: models.Segmenter,
    store: Store,
    config: PredictConfig | None = None,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> Made:
    """A segmenter's mask of each image into the store. What is there already is left alone; an image that cannot be
    read is recorded as a failure and does not stop the others."""
    config = config or PredictConfig()
    check_classes("predict_masks", source, model)
    model = model.to(choose_device(config.device), memory_format=torch.channels_last).eval()

    def label(block: list[tuple]) -> list[Tensor]:
        return _predict(model, [image for _, image in block], [item.classes for item, _ in block], config)

    return _label_all(source, store, config, source.image, label, progress, together=True)


def train_cycle(
    source: data.Source,
    config: train.SegmentationConfig,
    out: str | Path,
    *,
    labels=None,
    weights: str | Path | None = None,
    validation: data.Source | None = None,
    prediction: PredictConfig | None = None,
    resume: bool = False,
    progress: Callable[[str], Callable[[int, int, str], None] | None] = lambda stage: None,
    begun: Callable[[dict[str, str]], None] | None = None,
) -> Path:
    """PMM's cyclic pseudo masks: a segmenter is trained in OUT/first, predicts the images that it was trained on
    (OUT/first/masks), and another one is trained on these from the start, in OUT, without pretended under-fitting.

    Arguments as of train.train_segmenter. prediction: None: PredictConfig.multi(). resume: goes on where it was
    stopped. progress: of a stage's name, what it reports to.
    """
    out, folder, prediction = Path(out), Path(out) / "first", prediction or PredictConfig.multi()
    if prediction.shard is not None:
        raise ValueError(f"train_cycle: expected a prediction of all images, got shard {prediction.shard}")
    if resume and not folder.exists() and train.is_begun(out):
        raise ValueError(f"train_cycle: expected to go on with a cycle, got {out}, where a training without one began; "
                         f"choose another folder")  # fmt: skip
    given, store = dict(weights=weights, validation=validation, resume=resume), Store(folder)
    path = folder / "prediction.json"
    with processes(config.device) as here:

        def start(inputs: dict[str, str]) -> None:
            if here.rank == 0 and not resume:  # what an earlier cycle left would be taken for this one's
                train.clear_segmenter(out)
                for name in store.mask_names():
                    store.mask_path(name).unlink()
            if begun is not None:
                begun(inputs)

        checkpoint = train.train_segmenter(source, config, folder, labels=labels, progress=progress("first"),
                                           scanned=progress("scan"), begun=start, **given)  # fmt: skip
        prediction = dataclasses.replace(prediction, device=str(here.device))
        beside = {"checkpoint": files.digest(checkpoint)}
        if path.is_file():
            there = json.loads(path.read_text("utf-8"))
            found = configuration.differences(prediction, there["config"], ("device", "workers", "batch"))
            found += ["network"] * (there["checkpoint"] != beside["checkpoint"])
            if found and store.mask_names():
                raise ValueError(f"train_cycle: expected to go on in {folder} as it began, got another "
                                 f"{', '.join(found)}; remove {store.masks}, or choose another folder")  # fmt: skip
        together(here)
        if here.rank == 0:
            configuration.write(path, prediction, **beside)
        made = predict_masks(source, models.open_segmenter(checkpoint), store, prediction, progress=progress("masks"))
        failed = {name: reason for part in together(here, made.failed) for name, reason in part.items()}
        if failed:
            name, reason = next(iter(failed.items()))
            raise ValueError(f"train_cycle: expected a mask of every image, got none of {len(failed)}, {name} for one: "
                             f"{reason}; mend it and go on with resume")  # fmt: skip
        last = dataclasses.replace(config, under_fitting=None)
        return train.train_segmenter(source, last, out, labels=store.masks, progress=progress("last"),
                                     scanned=progress("scan again"), **given)  # fmt: skip


def _predict(model, images: list[np.ndarray], classes: list[tuple[int, ...]], config: PredictConfig) -> list[Tensor]:
    """(H, W) uint8 of each."""
    device, sizes = next(model.parameters()).device, [image.shape[:2] for image in images]
    shares = [min(1.0, config.largest / max(size)) for size in sizes]
    images = [data.rescale(image, data.scaled_size(image.shape[:2], share)) if share < 1 else image
              for image, share in zip(images, shares, strict=True)]  # fmt: skip
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        found = label_probabilities(model, images, scales=config.scales, mirror=config.mirror, window=config.window,
                                    stride=config.stride)  # fmt: skip
    names = None
    if config.known:
        names = [torch.tensor([0, *(key + 1 for key in present)], device=device) for present in classes]
        found = [own[allowed] for own, allowed in zip(found, names, strict=True)]
        found = [own / own.sum(0) for own in found]
    if config.crf:
        pictures = [torch.from_numpy(image).to(device) for image in images]
        energies = [own.clamp(min=1e-5).log_().neg_() for own in found]
        terms = dict(gaussian=config.gaussian, bilateral=config.bilateral, iterations=config.iterations)
        found = ops.dense_crf(pictures, energies, **terms)
    labels = [own.argmax(0) for own in found]
    if names is not None:
        labels = [allowed[own] for own, allowed in zip(labels, names, strict=True)]
    labels = [own.to(torch.uint8) for own in labels]
    return [own if own.shape == size else F.interpolate(own[None, None], size=size, mode="nearest-exact")[0, 0]
            for own, size in zip(labels, sizes, strict=True)]  # fmt: skip


def _label_all(source, store: Store, config, load: Callable, label: Callable, progress, *, together: bool) -> Made:
    """Masks of the images that have none yet: `load` of each item, by threads, then `label` of some of these together,
    [(item, loaded), ...] -> masks; one after another where that raises one of LACKING.

    together: a mask may differ in its last bits with those that are labelled beside it, so these are the same whoever
    makes it, and whatever is there already.
    """
    size = config.batch if together else 1
    units = _share([tuple(range(len(source)))[i : i + size] for i in range(0, len(source), size)], config)
    known, start = store.metrics(), time.perf_counter()

    def read(place: tuple) -> tuple:
        unit, number, wanted = place
        item = source[number]
        try:
            return unit, item, wanted, load(item), None
        except (OSError, ValueError) as error:
            return unit, item, wanted, None, str(error)

    def labelled(block: list[tuple]) -> list[tuple]:
        try:
            return [(item, None, mask.cpu().numpy()) for (item, _), mask in zip(block, label(block), strict=True)]
        except LACKING as error:
            failure = _reason(error)
        return [(block[0][0], failure)] if len(block) == 1 else [made for one in block for made in labelled([one])]

    def made(begun: Iterator) -> Iterator[tuple]:
        """(item, error, mask), block by block."""
        places = ((unit, number, number in left) for unit, left in begun for number in (unit if together else left))
        loaded = data.prefetch(read, places, workers=config.workers, ahead=2 * config.batch)
        by_unit = (list(block) for _, block in itertools.groupby(loaded, operator.itemgetter(0)))
        for block in by_unit if together else _blocks(loaded, config.batch):
            missing = {item.name for _, item, wanted, _, _ in block if wanted}
            yield from ((item, error) for _, item, _, _, error in block if error is not None and item.name in missing)
            if ready := [(item, loaded) for _, item, _, loaded, error in block if error is None]:
                yield from (one for one in labelled(ready) if one[0].name in missing)

    def keep(item: data.Item, mask: np.ndarray) -> None:
        """With the facts of the image's maps, which may be in the same store."""
        store.record(item.name, **known.get(item.name, {}) | {"mask_seconds": _since(start)})
        store.save_mask(item.name, mask)

    with _Stage(source, store, "masks", units, config, progress) as stage:
        for begun in stage.rounds():
            _save_all(stage, made(begun), keep, ahead=config.batch)
    return stage.result


def _blocks(things: Iterator, size: int) -> Iterator[list]:
    block = []
    for thing in things:
        block.append(thing)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


@dataclass(frozen=True)
class EvaluateConfig:
    thresholds: str = "0:0.6:0.01"  # of the background: lowest:highest:step
    format: Literal["auto", "npz", "irn", "pmm"] = "auto"  # of the files; auto: what they are
    resamples: int = 1000  # of the images, for the interval of mIoU; 0: none, and no memory that grows with the images
    confidence: float = 0.95  # of that interval
    seed: int = 0  # of its resamples
    workers: int = 2  # threads that read and count; results do not depend on them

    def __post_init__(self):
        self.values()
        if self.workers < 0 or self.resamples < 0 or not 0 < self.confidence < 1:
            raise ValueError(f"EvaluateConfig: expected workers and resamples of at least 0 and a confidence between 0 "
                             f"and 1, got {self.workers}, {self.resamples} and {self.confidence}")  # fmt: skip

    def values(self) -> np.ndarray:
        try:
            low, high, step = map(float, self.thresholds.split(":"))
            if not (step > 0 and low <= high < low + 1000 * step):
                raise ValueError
        except ValueError:
            raise ValueError(f"EvaluateConfig: expected thresholds lowest:highest:step, at most 1000, got "
                             f"{self.thresholds!r}") from None  # fmt: skip
        return np.round(low + step * np.arange(math.floor((high - low) / step + 1e-6) + 1), 10)


def evaluate_maps(
    source: data.Source,
    store: Store,
    config: EvaluateConfig | None = None,
    *,
    threshold: float | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    each: Callable[[data.Item, Counts], None] | None = None,
) -> dict:
    """mIoU of the store's maps against the source's masks at every threshold; IoU, precision and recall of each class
    at one of them, and mIoU's interval over images.

    threshold: that one, as chosen on other images; None: the best, which says too much of the images it is chosen on.
    each: is shown every image's counts, in order, at these thresholds and at that one.
    Images without masks are left out; those without classes count as background.
    """
    config = config or EvaluateConfig()
    items = _with_masks(source)
    _refuse_missing(items, "maps", store.folder, lambda item: not item.classes or item.name in store)
    grid = config.values() if threshold is None else np.union1d(config.values(), [threshold])
    sweep, images = ThresholdSweep(len(source.classes), grid), PerImage(len(source.classes), grid)

    def count(item: data.Item):
        with _named(item.name):
            mask = source.mask(item)
            if not item.classes:
                return sweep.count(np.empty((0, 0, 0), np.float32), (), mask)
            maps = store.read(item.name)
            if 0 not in maps.size and maps.size != mask.shape:
                raise ValueError(f"expected maps of the mask's size {mask.shape}, got {maps.size}")
            if maps.high_res is None:
                return sweep.count(maps.cam, maps.keys, mask, stride=4)
            return sweep.count(maps.high_res, maps.keys, mask)

    for item, counts in _counted(count, items, config, progress):
        sweep.add_counts(counts)
        if config.resamples:
            images.add_counts(counts)
        if each is not None:
            each(item, counts)
    mious, (best, best_miou) = sweep.mious(), sweep.best()
    at = best if threshold is None else threshold
    row = int(np.flatnonzero(grid == at)[0])
    return {
        "images": len(items),
        "thresholds": grid.tolist(),
        "mious": mious.tolist(),
        "best": {"threshold": best, "miou": best_miou},
        "reported": {
            "threshold": at,
            "miou": float(mious[row]),
            "chosen": "here" if threshold is None else "elsewhere",
        },
        "interval": _interval(images, row, config),
        **_of_classes(sweep.confusion(row), source.classes),
    }


def evaluate_masks(
    source: data.Source,
    store: Store,
    config: EvaluateConfig | None = None,
    *,
    progress: Callable[[int, int, str], None] | None = None,
    each: Callable[[data.Item, np.ndarray], None] | None = None,
) -> dict:
    """The same of the store's masks. 255 in them, where they leave a label open, counts as background, as in IRN.

    each: is shown every image's confusion matrix, in order.
    """
    config = config or EvaluateConfig()
    items = _with_masks(source)
    _refuse_missing(items, "masks", store.folder, lambda item: store.has_mask(item.name))
    confusion, images, unsure, pixels = Confusion(len(source.classes)), PerImage(len(source.classes)), 0, 0

    def count(item: data.Item):
        with _named(item.name):
            labels, mask = store.load_mask(item.name), source.mask(item)
            if labels.shape != mask.shape:
                raise ValueError(f"expected labels of the mask's size {mask.shape}, got {labels.shape}")
            open_ = labels == 255
            if open_.any():
                labels[open_] = 0
            counted = int((open_ & (mask != 255)).sum()) if open_.any() else 0
            return confusion.count(labels, mask), counted

    for item, (matrix, open_pixels) in _counted(count, items, config, progress):
        confusion.matrix += matrix
        unsure, pixels = unsure + open_pixels, pixels + int(matrix.sum())
        if config.resamples:
            images.add_matrix(matrix)
        if each is not None:
            each(item, matrix)
    return {
        "images": len(items),
        "reported": {"miou": confusion.miou()},
        "interval": _interval(images, 0, config),
        "unsure": unsure / max(1, pixels),
        **_of_classes(confusion, source.classes),
    }


def _with_masks(source: data.Source) -> list[data.Item]:
    items = [item for item in source if item.mask is not None or item.name in source.drawings]
    if not items:
        raise ValueError(f"evaluate: expected images with masks, got {len(source)} without any")
    return items


def _refuse_missing(items: list[data.Item], what: str, folder: Path, is_there: Callable) -> None:
    missing = [item.name for item in items if not is_there(item)]
    if missing:
        raise FileNotFoundError(f"evaluate: expected {what} of {len(items)} images in {folder}, got none of "
                                f"{_some(missing)}; make them first")  # fmt: skip


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"evaluate: {name}: {error}") from error


def _counted(count: Callable, items: list[data.Item], config: EvaluateConfig, progress) -> Iterator:
    """By threads: what they spend their time in, decoding and counting, leaves Python's lock to others."""
    ahead = max(4, 2 * config.workers)
    for done, (item, found) in enumerate(zip(items, data.prefetch(count, items, workers=config.workers, ahead=ahead),
                                             strict=True), 1):  # fmt: skip
        yield item, found
        if progress is not None:
            progress(done, len(items), item.name)


def _interval(images: PerImage, row: int, config: EvaluateConfig) -> dict | None:
    if not config.resamples:
        return None
    facts = {"confidence": config.confidence, "resamples": config.resamples, "seed": config.seed}
    low, high = bootstrap_interval(images.numbers(row), resamples=config.resamples, confidence=config.confidence,
                                   seed=config.seed)  # fmt: skip
    return {"low": _number(low), "high": _number(high), **facts}


def _of_classes(confusion: Confusion, classes: tuple[str, ...]) -> dict:
    names = ("background", *classes)
    measures = {"ious": confusion.iou(), "precision": confusion.precision(), "recall": confusion.recall(),
                "f1": confusion.f1()}  # fmt: skip
    return {measure: dict(zip(names, map(_number, values), strict=True)) for measure, values in measures.items()}


def _number(value: float) -> float | None:
    """As JSON has it."""
    return None if math.isnan(value) else float(value)


def read_threshold(path: str | Path) -> float:
    """The best threshold of an evaluation.json."""
    try:
        return float(json.loads(Path(path).read_text("utf-8"))["best"]["threshold"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"evaluate: expected an evaluation.json with a best threshold, got {path}") from error


def _some(names) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
