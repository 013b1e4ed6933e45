"""What stages share: a source's images on their way into a store, by several processes."""

import contextlib
import dataclasses
import itertools
import logging
import operator
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from .. import data, files, models
from ..claims import Work
from ..errors import lacks_memory
from ..processes import choose_shard
from ..store import CLAIMS, Store

log = logging.getLogger("ribfast")
DIED = ("{} processes died with it, the last one with nothing else in hand; reduce or remove the image, or give it "
        "more memory; the next start tries it again, by itself")  # fmt: skip


def check_classes(stage: str, source: data.Source, model: models.CamClassifier | models.Segmenter) -> None:
    """Refuses a network of other classes than the data's."""
    if model.n_classes != len(source.classes) or model.classes not in (None, source.classes):
        has, kind = first_few(model.classes) if model.classes else model.n_classes, model.kind
        raise ValueError(f"{stage}: expected a {kind} of the data's classes ({first_few(source.classes)}), got one "
                         f"of {has}; train one on this data")  # fmt: skip


def first_few(names) -> str:
    """The first of them, and how many more."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class Failure(NamedTuple):
    """Why an image could not be made; for lack of memory, which there may be once nothing else is in hand."""

    reason: str
    lacks_memory: bool = False


@dataclass
class Made:
    """What became of the images, or of a share of them."""

    made: int = 0
    kept: int = 0  # were in the store
    without_classes: int = 0
    elsewhere: int = 0  # made meanwhile by other processes
    failed: dict[str, str] = dataclasses.field(default_factory=dict)  # why, by name, in any process


class Stage:
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
        self._failures, self._unit, self._open, self._late, self._again = store.failures(), {}, {}, [], False
        self._mine, self._elsewhere, self._failed = set(), set(), {}
        (index, count), known = choose_shard(config.shard), store.metrics()
        for number in skipped if config.shard is not None or index == 0 else ():
            name = source[number].name
            if known.get(name) != {"skipped": "no classes"}:
                store.record(name, skipped="no classes")
        deaths = store.deaths()
        self.work = Work(
            store.folder / CLAIMS, units, lambda unit: f"{what} {source[unit[0]].name}", self._left,
            (0, 1) if config.shard is not None else (index, count),
            deaths=lambda number: deaths.get(source[number].name, 0), give_up=self._give_up,
        )  # fmt: skip

    def __enter__(self) -> "Stage":
        self._report("")
        return self

    def __exit__(self, kind, *exception) -> None:
        self.work.close()
        if kind is None:
            self._look()
            if self._elsewhere:
                self._report("")
            self.result.elsewhere = len(self._elsewhere - self._failed.keys())
            self.result.failed = self._failed | self.result.failed

    @property
    def alone(self) -> bool:
        """Whether the round is of one image, with nothing else in hand."""
        return self._again or self.work.alone

    def rounds(self) -> Iterator[Iterator[tuple[Sequence[int], list[int]]]]:
        """Units, with the images of them that are to be made; each of these is to `end` before the next round. Images
        that lacked memory come again, a round each."""
        for units in self.work.rounds():
            yield self._begun(units)
            late, self._late, self._again = self._late, [], True
            for name in late:
                log.info("%s: not enough memory; once more, with nothing else in hand", name)
                unit = self._unit[name]
                yield iter([(unit, [number for number in unit if self.source[number].name == name])])
            self._again = False

    def end(self, name: str, failure: Failure | None = None) -> None:
        """An image is in the store, or cannot be."""
        if failure is None:
            self.result.made += 1
        elif failure.lacks_memory and not self._again:
            self._late.append(name)
            return
        else:
            self._fail(name, failure.reason)
        unit = self._unit.pop(name)
        self._open[unit] -= 1
        if not self._open[unit]:
            del self._open[unit]
            self.work.release(unit)
        self._report(name)

    def _fail(self, name: str, reason: str, **facts) -> None:
        self.result.failed[name] = reason
        self.store.fail(name, reason, **facts)
        log.warning("%s: %s", name, reason)

    def _give_up(self, number: int, deaths: int) -> None:
        name = self.source[number].name
        self._mine.add(name)
        self._fail(name, DIED.format(deaths), deaths=deaths)
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


def own_share(things: list, config) -> list:
    """Those of this process alone, where its configuration says so."""
    if config.shard is None:
        return things
    index, count = choose_shard(config.shard)
    return things[index::count]


def save_all(stage: Stage, made: Iterator[tuple], keep: Callable, *, ahead: int) -> None:
    """`keep` of each (item, failure, what was made of it), by a thread of its own."""

    def save(one: tuple) -> tuple[str, Failure | None]:
        item, failure, *found = one
        if failure is None:
            try:
                keep(item, *found)
                stage.mend(item.name)
            except Exception as unfit:  # what was made
                failure = failure_of(unfit, ValueError)
        return item.name, failure

    for name, failure in data.prefetch(save, made, workers=1, ahead=ahead):
        stage.end(name, failure)


def keep_maps(store: Store, name: str, keys, cam, high_res, **facts) -> None:
    """Facts before maps: an image with maps is not made again, so its facts would be missing for good."""
    store.record(name, **facts)
    store.save(name, keys, cam, high_res)


def label_all(source, store: Store, config, load: Callable, label: Callable, progress, *, together: bool) -> Made:
    """Masks of the images that have none yet: `load` of each item, by threads, then `label` of some of these together,
    [(item, loaded), ...] -> masks; one after another where that fails.

    together: a mask may differ in its last bits with those that are labelled beside it, so these are the same whoever
    makes it, and whatever is there already.
    """
    size = config.batch if together else 1
    units = own_share([tuple(range(len(source)))[i : i + size] for i in range(0, len(source), size)], config)
    known, clock = store.metrics(), Clock()

    def read(place: tuple) -> tuple:
        unit, number, wanted = place
        item = source[number]
        try:
            return unit, item, wanted, load(item), None
        except Exception as error:
            return unit, item, wanted, None, failure_of(error, OSError, ValueError)

    def labelled(block: list[tuple]) -> list[tuple]:
        try:
            return [(item, None, mask.cpu().numpy()) for (item, _), mask in zip(block, label(block), strict=True)]
        except Exception as error:
            failure = failure_of(error, ValueError, RuntimeError)
        return [(block[0][0], failure)] if len(block) == 1 else [made for one in block for made in labelled([one])]

    def made(begun: Iterator) -> Iterator[tuple]:
        """(item, failure, mask), block by block; what is made alone with no others of its unit."""
        whole = together and not stage.alone
        places = ((unit, number, number in left) for unit, left in begun for number in (unit if whole else left))
        loaded = data.prefetch(read, places, workers=config.workers, ahead=2 * config.batch)
        by_unit = (list(block) for _, block in itertools.groupby(loaded, operator.itemgetter(0)))
        for block in by_unit if together else _blocks(loaded, config.batch):
            missing = {item.name for _, item, wanted, _, _ in block if wanted}
            yield from ((item, failure) for _, item, _, _, failure in block if failure and item.name in missing)
            if ready := [(item, loaded) for _, item, _, loaded, failure in block if failure is None]:
                yield from (one for one in labelled(ready) if one[0].name in missing)

    def keep(item: data.Item, mask: np.ndarray) -> None:
        """With the facts of the image's maps, which may be in the same store."""
        store.record(item.name, **known.get(item.name, {}) | clock.facts("mask_"))
        store.save_mask(item.name, mask)

    with Stage(source, store, "masks", units, config, progress) as stage:
        for begun in stage.rounds():
            save_all(stage, made(begun), keep, ahead=config.batch)
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


def failure_of(error: Exception, *kinds: type[Exception]) -> Failure:
    """Of an image that cannot be made. What is of none of these kinds, nor a lack of memory, is raised again."""
    lacks = lacks_memory(error)
    if not lacks and not isinstance(error, kinds):
        raise error
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what was taken for it is free for the next
    reason = files.first_line(error)
    return Failure(f"not enough memory: {reason}; reduce the image, or free some" if lacks else reason, lacks)


class Clock:
    """When a process began with a stage, and for how long it has been at it: together the time that it took, which
    that of others, before or beside it, may overlap."""

    def __init__(self):
        self._began, self._start = round(time.time(), 3), time.perf_counter()

    def facts(self, of: str = "") -> dict[str, float]:
        """Of an image's line in metrics.jsonl, in seconds since 1970 and since then."""
        return {f"{of}began": self._began, f"{of}seconds": round(time.perf_counter() - self._start, 3)}
