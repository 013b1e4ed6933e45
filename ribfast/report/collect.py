"""From a run's stores and a data source to what the page shows, as JSON has it."""

import base64
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from .. import __version__, data, files
from ..cams import enlarge_cams
from ..metrics import Counts, ThresholdSweep, bootstrap_gain
from ..pipeline import EvaluateConfig, evaluate_maps, evaluate_masks
from ..store import CONFIG, FAILURES, METRICS, Store, open_maps, open_masks
from .page import Report, page

log = logging.getLogger("ribfast")
MAP_VALUES = 40 << 10  # of an image's maps in the page, however many there are: 13 of 64 x 48
# shares of the sides of maps and of pictures, tried one after another where the page would become too large
SHRUNK = ((1.0, 1.0), (0.9, 0.9), (0.8, 0.85), (0.7, 0.8), (0.7, 0.7), (0.6, 0.6), (0.5, 0.5), (0.4, 0.4), (0.3, 0.3))

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ReportConfig(EvaluateConfig):
    """How a run is evaluated, and what of it the page shows."""

    images: int = 200  # at most; of more a sample, with the best and the worst
    photo_side: int = 240  # pixels of the longer side of photographs and label maps in the page
    map_side: int = 64  # of class maps in the page, which shows them enlarged; less for many classes and steps
    quality: int = 80  # of the photographs' JPEG, of 100
    megabytes: float = 15.0  # of the page, at most: where it would have more, the images that take most are shrunk
    title: str | None = None  # of the page; none: the data and the split

    def __post_init__(self):
        super().__post_init__()
        for name, most in {"images": 10000, "photo_side": 4096, "map_side": 4096, "quality": 100}.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"ReportConfig: expected {name} of 1 to {most}, got {getattr(self, name)}")
        if not self.megabytes > 0:
            raise ValueError(f"ReportConfig: expected megabytes above 0, got {self.megabytes}")


@dataclass(frozen=True)
class Stage:
    """A run's folder of maps, or of masks, under the name that the page gives it."""

    name: str
    store: Store
    has_maps: bool  # else masks
    threshold: float | None = None  # of its maps, as chosen on other images; None: the best
    split: str | None = None  # of which its images are, where they are not the page's: `source`
    source: data.Source | None = None

    @property
    def kind(self) -> str:
        return "maps" if self.has_maps else "masks"

    def is_there(self, item: data.Item) -> bool:
        return item.name in self.store if self.has_maps else self.store.has_mask(item.name)


@dataclass(frozen=True)
class Training:
    """A training's folder, under the name that the page gives it."""

    name: str
    folder: Path


def open_stage(
    name: str,
    folder: Path,
    format: str = "auto",
    threshold: float | None = None,
    split: str | None = None,
    source: data.Source | None = None,
) -> Stage:
    """A run's folder, or one of map files or NAME.png; of a run that has both, its maps.

    split, source: where it is of other images than the page's, which has its row in the tables alone.
    """
    maps = open_maps(folder, format)
    if maps.names():
        return Stage(name, maps, True, threshold, split, source)
    masks = open_masks(folder)
    if not masks.mask_names():
        raise FileNotFoundError(f"report: expected maps or masks in {folder}, got none; make them first")
    if threshold is not None:
        raise ValueError(f"report: expected a threshold of maps, got one of {name}, which are masks")
    return Stage(name, masks, False, None, split, source)


def open_training(name: str, folder: Path) -> Training:
    """A folder that train-classifier, train-irn or train-seg wrote."""
    if not any({"step", "loss"} <= facts.keys() for facts in files.lines(Path(folder) / METRICS)):
        raise FileNotFoundError(f"report: expected a training's steps in {Path(folder) / METRICS}, got none")
    return Training(name, Path(folder))


def collect(
    source: data.Source,
    stages: Sequence[Stage],
    config: ReportConfig | None = None,
    *,
    trainings: Sequence[Training] = (),
    run: Path | None = None,
    machine: dict | None = None,
    progress: Progress | None = None,
) -> Report:
    """What `eval` finds of each stage, over all images, and pictures and counts of those that the page shows.

    An image's counts are what sums up to `eval`'s numbers, at every threshold. Data without masks have no mIoU.
    run: the folder that `ribfast run` made these in. machine: what made the page, as info.machine has it.
    """
    config = config or ReportConfig()
    for what, named in (("stages", stages), ("trainings", trainings)):
        names = [one.name for one in named]
        if len({*names}) < len(names) or (what == "stages" and not names):
            raise ValueError(f"report: expected {what}, each of a name of its own, got {', '.join(names) or 'none'}")
    own = [stage for stage in stages if stage.source is None]
    if not own:
        raise ValueError(f"report: expected a stage of the page's own images, got {stages[0].name} of others; add one")
    if run is not None and not _run_in(run):
        raise FileNotFoundError(f"report: expected the configuration of a run in {Path(run) / CONFIG}, got none")
    judged, first, scores, facts = source.masked(), None, {}, {}
    for stage in stages:
        images = source if stage.source is None else stage.source
        there = images.masked()
        evaluation, numbers = _evaluate(images, stage, config, progress) if there else (None, None)
        facts[stage.name] = found = _facts(images, stage, evaluation, config, whole=run is not None)
        if stage.source is not None or not there:
            continue
        if first is None:
            first = found, numbers
        else:
            found["gain"] = _gain(found, numbers, *first, config)
        scores = dict(zip((item.name for item in judged), _own_mious(numbers), strict=True))
    shown, found = _sample(source, scores, config.images), [facts[stage.name] for stage in own]
    report = {
        "ribfast": __version__,
        "title": config.title or "ribfast report",
        "made": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "classes": list(source.classes),
        "total": len(source),
        "judged": len(judged),
        "left_out": 0 if run is None else _left_out(source, own, Path(run)),
        "confidence": config.confidence if config.resamples and judged else None,
        "run": None if run is None else _run_text(_run_in(run)),
        "trainings": [_training(training) for training in trainings],
        "elsewhere": [facts[stage.name] for stage in stages if stage.source is not None],
        "stages": found,
        "images": [],
    }
    read = ImageReader(source, own, [facts["thresholds"] for facts in found], config)
    room = 1e6 * config.megabytes - len(page(report).encode())
    report["images"] = images = _pictured(read, shown, room, config, progress)
    for number, facts in enumerate(found):
        facts["steps"] = max([1, *(len(image["stages"][number].get("counts", ())) for image in images)])
    return report


def _pictured(read: "ImageReader", items: list[data.Item], room: float, config, progress) -> list[dict]:
    """What the page has of each image; where all take more than `room` bytes, those that take most of it are shrunk."""

    def pictures(limits: dict[int, float]) -> dict[int, dict]:
        found = {}
        if progress is not None:
            progress(0, len(limits), "")
        makes = data.prefetch(lambda n: read(items[n], limits[n]), [*limits], workers=config.workers, ahead=4)
        for number, image in zip(limits, makes, strict=True):
            found[number] = image
            if progress is not None:
                progress(len(found), len(limits), items[number].name)
        return found

    found = pictures(dict.fromkeys(range(len(items)), math.inf))
    sizes = {number: _size(image) for number, image in found.items()}
    most = _largest(list(sizes.values()), room)
    if math.isfinite(most):
        found |= pictures({number: most for number, size in sizes.items() if size > most})
        if sum(map(_size, found.values())) > room:
            log.warning("report: its %d images do not fit into %g MB, however small; show fewer (images), or allow "
                        "more (megabytes)", len(items), config.megabytes)  # fmt: skip
    return [found[number] for number in range(len(items))]


def _size(image: dict) -> int:
    """In the page, with a comma."""
    return len(json.dumps(image, separators=(",", ":")).replace("<", "\\u003c")) + 1


def _largest(sizes: list[int], room: float) -> float:
    """The most that one may have so that all fit: infinity if they do as they are."""
    for number, size in enumerate(sorted(sizes)):
        share = room / (len(sizes) - number)
        if size > share:
            return max(0.0, share)
        room -= size
    return math.inf


def _evaluate(source, stage: Stage, config: ReportConfig, progress) -> tuple[dict, np.ndarray]:
    """What `eval` says, and what each image adds to it."""
    kept = []
    if stage.has_maps:
        found = evaluate_maps(source, stage.store, config, threshold=stage.threshold, progress=progress,
                              keep=kept.append)  # fmt: skip
    else:
        found = evaluate_masks(source, stage.store, config, progress=progress, keep=kept.append)
    return found, kept[0]


def _own_mious(numbers: np.ndarray) -> list[float]:
    """Each image's own; 0 where it has no pixel to count."""
    right, predicted, true = numbers.astype(np.int64).transpose(1, 0, 2)
    union = predicted + true - right
    ious = np.where(union > 0, right / np.maximum(union, 1), 0)
    return (ious.sum(1) / np.maximum((union > 0).sum(1), 1)).tolist()


def _gain(found: dict, numbers: np.ndarray, first: dict, before: np.ndarray, config: ReportConfig) -> dict | None:
    """Of mIoU over the first stage's, and its interval, for which each resample draws the same images of both."""
    mious = [facts["evaluation"]["reported"]["miou"] for facts in (first, found)]
    if None in mious:
        return None
    gain = {"miou": mious[1] - mious[0], "low": None, "high": None}
    if config.resamples:
        settings = {"resamples": config.resamples, "confidence": config.confidence, "seed": config.seed}
        gain["low"], gain["high"] = bootstrap_gain(numbers, before, **settings)
    return gain


def _left_out(source, stages: list[Stage], run: Path) -> int:
    """Images of a run that the page is not of: those that could not be read, and those that a stage failed on."""
    unread = {line["name"] for line in files.lines(run / FAILURES) if line.get("part") == "split"}
    failed = {name for stage in stages for name in stage.store.failures()}
    return len((unread | failed) - {item.name for item in source})


def _facts(source, stage: Stage, evaluation: dict | None, config: ReportConfig, *, whole: bool) -> dict:
    """whole: of the stage's failures, all that its folder has; else those among the source's images."""
    run, failed, lines = _run_of(stage.store), stage.store.failures(), files.lines(stage.store.folder / METRICS)
    names = {item.name for item in source}
    took = _took([line for line in lines if line.get("name") in names], "" if stage.has_maps else "mask_")
    facts = {
        "name": stage.name,
        "kind": stage.kind,
        "images": sum(stage.is_there(item) for item in source),
        "failed": len(failed if whole else names & failed.keys()),
        "split": stage.split,
        "seconds": took and took[0],
        "rate": took and took[1] / took[0],
        "command": run.get("command"),
        "run": _run_text(run),
        "gain": None,
        "threshold": stage.threshold,
        "thresholds": evaluation["thresholds"] if evaluation and stage.has_maps else config.values().tolist(),
        "evaluation": None,
    }
    if evaluation is not None:
        labels = ("background", *source.classes)
        measures = {name: [evaluation[name][label] for label in labels] for name in ("ious", "precision", "recall")}
        kept = {name: evaluation.get(name) for name in ("images", "reported", "interval", "mious", "best", "unsure")}
        if math.isnan(evaluation["reported"]["miou"]):  # every pixel is to be ignored
            kept["reported"] = evaluation["reported"] | {"miou": None}
        facts["evaluation"] = kept | measures
    return facts


def _training(training: Training) -> dict:
    """Its steps, their time and rate, and the mean loss of the last tenth of them."""
    run = _run_in(training.folder) or _run_in(training.folder.parent)  # a cycle's first
    steps = [facts for facts in files.lines(training.folder / METRICS) if {"step", "loss"} <= facts.keys()]
    took, settings = _took(steps, ""), run.get("config", {})
    batch, last = settings.get("batch"), [facts["loss"] for facts in steps[-max(1, len(steps) // 10) :]]
    return {
        "name": training.name,
        "command": run.get("command"),
        "network": settings.get("network"),
        "batch": batch,
        "steps": len(steps),
        "loss": sum(last) / len(last),
        "seconds": took and took[0],
        "rate": took[1] * batch / took[0] if took and batch else None,
        "run": _run_text(run),
    }


def _run_of(store: Store) -> dict:
    """The folder's config.json, or that of the run which it is a part of."""
    is_part = store.folder.name in ("maps", "masks")
    return _run_in(store.folder) or (_run_in(store.folder.parent) if is_part else {})


def _run_in(folder: Path) -> dict:
    path = Path(folder) / CONFIG
    if not path.is_file():
        return {}
    run = files.read_object(path)
    if run is None:
        raise ValueError(f"report: expected a run's configuration in {path}, got no JSON object")
    return run


def _run_text(run: dict) -> str | None:
    return json.dumps(run, indent=2) if run else None


def _took(lines: list[dict], of: str) -> tuple[float, int] | None:
    """(seconds, images or steps): the time in which any process was at it. Each line has when its process began, and
    for how long it had been at it; processes beside one another share their time, those after one another add theirs.
    """
    runs, things = {}, set()
    for facts in lines:
        began, seconds = (facts.get(f"{of}{name}") for name in ("began", "seconds"))
        if isinstance(began, (int, float)) and isinstance(seconds, (int, float)):
            runs[began] = max(seconds, runs.get(began, 0.0))
            things.add(facts.get("name", facts.get("step")))
    total, until = 0.0, -math.inf
    for began, seconds in sorted(runs.items()):
        total += max(0.0, began + seconds - max(began, until))
        until = max(until, began + seconds)
    return (round(total, 3), len(things)) if total > 0 else None


def _sample(source, scores: dict[str, float], most: int) -> list[data.Item]:
    """All images; of too many a quarter that are worst, a quarter that are best, the rest evenly, in the data's order.

    scores: mIoU by name, of those that have one.
    """
    if len(source) <= most:
        return list(source)
    ranked = sorted((number for number, item in enumerate(source) if item.name in scores),
                    key=lambda number: scores[source[number].name])  # fmt: skip
    quarter = min((most + 3) // 4, len(ranked) // 2)
    chosen = {*ranked[:quarter], *ranked[len(ranked) - quarter :]}
    rest = [number for number in range(len(source)) if number not in chosen]
    wanted = most - len(chosen)
    chosen |= {rest[len(rest) * part // wanted] for part in range(wanted)}
    return [source[number] for number in sorted(chosen)]


class ImageReader:
    """An item -> what the page has of it: pictures as base64, counts as varints."""

    def __init__(self, source, stages: Sequence[Stage], thresholds: Sequence[list[float]], config: ReportConfig):
        self.source, self.stages, self.config = source, stages, config
        self.sweeps = [ThresholdSweep(len(source.classes), grid) for grid in thresholds]

    def __call__(self, item: data.Item, limit: float = math.inf) -> dict:
        """limit: of its bytes, for which its pictures become smaller, down to the smallest of SHRUNK."""
        photo, mask = self.source.image(item), self.source.mask(item)
        facts = {"name": item.name, "classes": list(item.classes)}
        if mask is not None:
            labels, pixels = np.unique(mask[mask != 255], return_counts=True)
            facts["true"] = np.stack([labels, pixels], 1).tolist()
        stages = zip(self.stages, self.sweeps, strict=True)
        read = [self._stage(stage, sweep, item, photo.shape[:2], mask) for stage, sweep in stages]
        for of_maps, of_pictures in SHRUNK:
            found = facts | self._drawn(photo, mask, read, of_maps, of_pictures)
            if limit == math.inf or _size(found) <= limit:
                break
        return found

    def _drawn(self, photo, mask, read: list[tuple], of_maps: float, of_pictures: float) -> dict:
        """The image's part that is pictures, at these shares of their sides."""
        own = min(1.0, self.config.photo_side * of_pictures / max(photo.shape[:2]))
        size, quality = data.scaled_size(photo.shape[:2], own), [cv2.IMWRITE_JPEG_QUALITY, self.config.quality]
        stages = []
        for facts, labels, stacks in read:
            if labels is not None:
                facts = facts | {"labels": _encode(".png", _shrink_labels(labels, size))}
            if stacks is not None:
                facts = facts | self._maps(stacks, photo.shape[:2], of_maps)
            stages.append(facts)
        return {
            "size": size,
            "photo": _encode(".jpg", _shrink(photo, size)[..., ::-1], quality),
            "truth": None if mask is None else _encode(".png", _shrink_labels(mask, size)),
            "stages": stages,
        }

    def _stage(self, stage: Stage, sweep: ThresholdSweep, item, size, mask) -> tuple[dict, np.ndarray | None, list]:
        """(what is counted, labels, maps of each step)."""
        if stage.has_maps and not item.classes:  # background, as evaluate_maps counts it
            return {"keys": []}, None, None
        if not stage.is_there(item):
            return {}, None, None
        if stage.has_maps:
            return self._steps(stage, sweep, item, size, mask)
        labels = stage.store.load_mask(item.name)
        facts = {"found": np.unique(labels).tolist()}
        if mask is not None:
            counted = np.where(labels == 255, 0, labels)[mask != 255]  # as evaluate_masks counts
            true = mask[mask != 255]
            present = np.union1d(counted, true)
            facts["pixels"] = [[int(c), int((true[counted == c] == c).sum()), int((counted == c).sum())]
                               for c in present]  # fmt: skip
        return facts, labels, None

    def _steps(self, stage: Stage, sweep: ThresholdSweep, item, size, mask) -> tuple[dict, None, list | None]:
        """The maps after each step but the last, and the final ones."""
        own, kept = stage.store.load(item.name), stage.store.load_steps(item.name)
        keys, strided = own.keys.tolist(), ()
        if not keys:
            return {"keys": []}, None, None
        if kept is not None and kept[0].tolist() == keys:
            strided = torch.from_numpy(kept[1][:-1]).float() / 255
        stacks = [*(enlarge_cams(cam, size).numpy() for cam in strided), own.high_res]
        facts = {"keys": keys, "counts": [""] * len(stacks)}
        if mask is not None:
            counts = [sweep.count(cam, keys, mask, stride=4) for cam in strided]
            exact = stage.store.read(item.name)  # counted from what `eval` reads
            if exact.high_res is None:
                counts.append(sweep.count(exact.cam, exact.keys, mask, stride=4))
            else:
                counts.append(sweep.count(exact.high_res, exact.keys, mask))
            facts["counts"] = [_pack(part) for part in counts]
        return facts, None, stacks

    def _maps(self, stacks: list[np.ndarray], size: tuple[int, int], share: float) -> dict:
        """Of all steps below one another, each but the first step's as differences to the step before: they hardly
        change, and shrink best so."""
        fits = math.sqrt(MAP_VALUES / (len(stacks) * len(stacks[0]) * size[0] * size[1]))
        side = data.scaled_size(size, share * min(1.0, self.config.map_side / max(size), fits))
        layers = np.stack([np.concatenate([_shrink(plane, side) for plane in stack]) for stack in stacks])
        layers = np.rint(255 * np.clip(layers, 0, 1)).astype(np.uint8)
        layers[1:] -= layers[:-1].copy()  # modulo 256
        return {"map_size": side, "maps": _encode(".png", layers.reshape(-1, side[1]))}


def _pack(counts: Counts) -> str:
    """Pixels by how many thresholds lie below their largest map: of each key those predicted and those right, at last
    those of the true background, as varints."""
    keys = np.arange(len(counts.keys))
    predicted, right = counts.histogram.sum(0), counts.histogram[counts.keys + 1, keys]
    numbers = np.concatenate([np.stack([predicted, right], 1).ravel(), counts.histogram[0].sum(0)])
    coded = bytearray()
    for number in numbers.tolist():
        while number > 127:
            coded.append(number & 127 | 128)
            number >>= 7
        coded.append(number)
    return base64.b64encode(coded).decode()


def _shrink(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if picture.shape[:2] == tuple(size):
        return picture
    return cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA)


def _shrink_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def _encode(suffix: str, picture: np.ndarray, options: Sequence[int] = (cv2.IMWRITE_PNG_COMPRESSION, 9)) -> str:
    _, coded = cv2.imencode(suffix, picture, list(options))
    return base64.b64encode(coded).decode()
