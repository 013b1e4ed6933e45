"""From a run's stores and a data source to what the page shows, as JSON has it."""

import base64
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from .. import __version__, data, files
from ..cams import enlarge_cams
from ..metrics import Counts, PerImage, ThresholdSweep
from ..pipeline import EvaluateConfig, evaluate_maps, evaluate_masks
from ..store import CONFIG, METRICS, Store, open_maps, open_masks

MAP_VALUES = 40 << 10  # of an image's maps in the page, however many there are: 13 of 64 x 48

Progress = Callable[[int, int, str], None]
Report = dict  # of what JSON has


@dataclass(frozen=True)
class ReportConfig(EvaluateConfig):
    """How a run is evaluated, and what of it the page shows."""

    images: int = 200  # at most; of more a sample, with the best and the worst
    photo_side: int = 240  # pixels of the longer side of photographs and label maps in the page
    map_side: int = 64  # of class maps in the page, which shows them enlarged; less for many classes and steps
    quality: int = 80  # of the photographs' JPEG, of 100

    def __post_init__(self):
        super().__post_init__()
        for name, most in {"images": 10000, "photo_side": 4096, "map_side": 4096, "quality": 100}.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"ReportConfig: expected {name} of 1 to {most}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Stage:
    """A run's folder of maps, or of masks, under the name that the page gives it."""

    name: str
    store: Store
    has_maps: bool  # else masks
    threshold: float | None = None  # of its maps, as chosen on other images; None: the best

    @property
    def kind(self) -> str:
        return "maps" if self.has_maps else "masks"

    def is_there(self, item: data.Item) -> bool:
        return item.name in self.store if self.has_maps else self.store.has_mask(item.name)


def open_stage(name: str, folder: Path, format: str = "auto", threshold: float | None = None) -> Stage:
    """A run's folder, or one of map files or NAME.png; of a run that has both, its maps."""
    maps = open_maps(folder, format)
    if maps.names():
        return Stage(name, maps, True, threshold)
    masks = open_masks(folder)
    if not masks.mask_names():
        raise FileNotFoundError(f"report: expected maps or masks in {folder}, got none; make them first")
    if threshold is not None:
        raise ValueError(f"report: expected a threshold of maps, got one of {name}, which are masks")
    return Stage(name, masks, False)


def collect(
    source: data.Source,
    stages: Sequence[Stage],
    config: ReportConfig | None = None,
    *,
    progress: Progress | None = None,
) -> Report:
    """What `eval` finds of each stage, over all images, and pictures and counts of those that the page shows.

    An image's counts are what sums up to `eval`'s numbers, at every threshold. Data without masks have no mIoU.
    """
    config = config or ReportConfig()
    names = [stage.name for stage in stages]
    if not stages or len({*names}) < len(names):
        raise ValueError(f"report: expected stages, each of a name of its own, got {', '.join(names) or 'none'}")
    judged = [item for item in source if item.mask is not None or item.name in source.drawings]
    found, scores = [], {}
    for stage in stages:
        evaluation, scores = _evaluate(source, stage, config, progress) if judged else (None, {})
        found.append(_facts(source, stage, evaluation, config))
    shown = _sample(source, scores, config.images)
    read, images = ImageReader(source, stages, [facts["thresholds"] for facts in found], config), []
    if progress is not None:
        progress(0, len(shown), "")
    for item, image in zip(shown, data.prefetch(read, shown, workers=config.workers, ahead=4), strict=True):
        images.append(image)
        if progress is not None:
            progress(len(images), len(shown), item.name)
    for number, facts in enumerate(found):
        facts["steps"] = max(1, *(len(image["stages"][number].get("counts", ())) for image in images))
    return {
        "ribfast": __version__,
        "classes": list(source.classes),
        "total": len(source),
        "judged": len(judged),
        "confidence": config.confidence if config.resamples and judged else None,
        "stages": found,
        "images": images,
    }


def _evaluate(source, stage: Stage, config: ReportConfig, progress) -> tuple[dict, dict[str, float]]:
    """What `eval` says, and each image's own mIoU there, by name, where not all are shown."""
    grid = config.values() if stage.threshold is None else np.union1d(config.values(), [stage.threshold])
    names, images = [], PerImage(len(source.classes), grid if stage.has_maps else (0.0,))

    def note(item: data.Item, counts: Counts | np.ndarray) -> None:
        names.append(item.name)
        images.add_counts(counts) if stage.has_maps else images.add_matrix(counts)

    each = note if len(source) > config.images else None  # or all are shown, and the page ranks them
    if stage.has_maps:
        found = evaluate_maps(source, stage.store, config, threshold=stage.threshold, progress=progress, each=each)
        row = found["thresholds"].index(found["reported"]["threshold"])
    else:
        found, row = evaluate_masks(source, stage.store, config, progress=progress, each=each), 0
    if not names:
        return found, {}
    right, predicted, true = images.numbers(row).astype(np.int64).transpose(1, 0, 2)
    union = predicted + true - right
    ious = np.where(union > 0, right / np.maximum(union, 1), 0).sum(1) / np.maximum((union > 0).sum(1), 1)
    return found, dict(zip(names, ious.tolist(), strict=True))


def _facts(source, stage: Stage, evaluation: dict | None, config: ReportConfig) -> dict:
    run, seconds = _run_of(stage.store), _seconds(stage.store, "seconds" if stage.has_maps else "mask_seconds")
    facts = {
        "name": stage.name,
        "kind": stage.kind,
        "images": sum(stage.is_there(item) for item in source),
        "failed": len({item.name for item in source} & stage.store.failures().keys()),
        "seconds": seconds and seconds[0],
        "rate": seconds and seconds[1],
        "command": run.get("command"),
        "run": json.dumps(run, indent=2) if run else None,
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


def _run_of(store: Store) -> dict:
    """The folder's config.json, or that of the run which it is a part of."""
    for folder in (store.folder, store.folder.parent)[: 2 if store.folder.name in ("maps", "masks") else 1]:
        if (folder / CONFIG).is_file():
            try:
                run = json.loads((folder / CONFIG).read_text("utf-8"))
            except ValueError:
                run = None
            if not isinstance(run, dict):
                raise ValueError(f"report: expected a run's configuration in {folder / CONFIG}, got no JSON object")
            return run
    return {}


def _seconds(store: Store, key: str) -> tuple[float, float] | None:
    """(seconds, images a second) of all runs that made what is there; where times fall by half another run began."""
    times = [facts[key] for facts in files.lines(store.folder / METRICS) if isinstance(facts.get(key), (int, float))]
    ends = [now for now, later in zip(times, [*times[1:], 0], strict=False) if later < now / 2]
    return (sum(ends), len(times) / sum(ends)) if sum(ends) > 0 else None


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

    def __call__(self, item: data.Item) -> dict:
        photo, mask = self.source.image(item), self.source.mask(item)
        small = data.scaled_size(photo.shape[:2], min(1.0, self.config.photo_side / max(photo.shape[:2])))
        facts = {
            "name": item.name,
            "size": small,
            "classes": list(item.classes),
            "photo": _encode(".jpg", _shrink(photo, small)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, self.config.quality]),
            "truth": None,
        }
        if mask is not None:
            facts["truth"] = _encode(".png", _shrink_labels(mask, small))
            labels, pixels = np.unique(mask[mask != 255], return_counts=True)
            facts["true"] = np.stack([labels, pixels], 1).tolist()
        stages = zip(self.stages, self.sweeps, strict=True)
        facts["stages"] = [self._stage(stage, sweep, item, photo, mask, small) for stage, sweep in stages]
        return facts

    def _stage(self, stage: Stage, sweep: ThresholdSweep, item, photo, mask, small) -> dict:
        if stage.has_maps and not item.classes:  # background, as evaluate_maps counts it
            return {"keys": []}
        if not stage.is_there(item):
            return {}
        if stage.has_maps:
            return self._maps(stage, sweep, item, photo.shape[:2], mask)
        labels = stage.store.load_mask(item.name)
        facts = {"labels": _encode(".png", _shrink_labels(labels, small)), "found": np.unique(labels).tolist()}
        if mask is not None:
            labels = np.where(labels == 255, 0, labels)[mask != 255]  # as evaluate_masks counts
            true = mask[mask != 255]
            present = np.union1d(labels, true)
            facts["pixels"] = [[int(c), int((true[labels == c] == c).sum()), int((labels == c).sum())] for c in present]
        return facts

    def _maps(self, stage: Stage, sweep: ThresholdSweep, item, size, mask) -> dict:
        """The maps after each step but the last, and the final ones, below one another, each but the first step's as
        differences to the step before: they hardly change, and shrink best so."""
        own, kept = stage.store.load(item.name), stage.store.load_steps(item.name)
        keys, strided = own.keys.tolist(), ()
        if not keys:
            return {"keys": []}
        if kept is not None and kept[0].tolist() == keys:
            strided = torch.from_numpy(kept[1][:-1]).float() / 255
        stacks = [*(enlarge_cams(cam, size).numpy() for cam in strided), own.high_res]
        share = math.sqrt(MAP_VALUES / (len(stacks) * len(keys) * size[0] * size[1]))
        side = data.scaled_size(size, min(1.0, self.config.map_side / max(size), share))
        layers = np.stack([np.concatenate([_shrink(plane, side) for plane in stack]) for stack in stacks])
        layers = np.rint(255 * np.clip(layers, 0, 1)).astype(np.uint8)
        layers[1:] -= layers[:-1].copy()  # modulo 256
        facts = {"keys": keys, "map_size": side, "maps": _encode(".png", layers.reshape(-1, side[1]))}
        if mask is not None:
            counts = [sweep.count(cam, keys, mask, stride=4) for cam in strided]
            exact = stage.store.read(item.name)  # counted from what `eval` reads
            if exact.high_res is None:
                counts.append(sweep.count(exact.cam, exact.keys, mask, stride=4))
            else:
                counts.append(sweep.count(exact.high_res, exact.keys, mask))
            facts["counts"] = [_pack(part) for part in counts]
        else:
            facts["counts"] = [""] * len(stacks)
        return facts


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
