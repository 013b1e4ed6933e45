"""From labelled photographs to masks, a segmenter and its predictions: the other commands, one after another.

Each stage is a command line, which can be run by itself: what it made before it is not made again.
"""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from . import data, files
from .store import Store

log = logging.getLogger("ribfast")


@dataclass(frozen=True)
class RunConfig:
    """The defaults are for some hundreds of photographs and a laptop; --set changes a stage's own fields."""

    # of classifier, segmenter
    network: Literal["resnet10", "resnet18", "resnet50", "resnet101", "mobilenet_v2"] = "mobilenet_v2"
    # crops and passes: for pictures of about 100 pixels, photographs of about 320, or the papers'
    size: Literal["tiny", "small", "published"] = "small"
    rib: Literal["none", "released", "paper", "coco", "fast"] = "fast"  # how the classifier is adapted to each image
    masks: Literal["crf", "irn", "ppmg", "par", "pamr", "threshold"] = "crf"  # how masks are made of its maps
    compared: tuple[Literal["crf", "ppmg", "par", "pamr", "threshold"], ...] = ()  # masks of the same maps otherwise
    segmenter: bool = True  # train one on the masks, and predict
    relabel: bool = False  # predict --split's images too, where --validation's are predicted; the report shows them
    cycle: bool = False  # PMM's: train it again on what it predicts
    normalization: Literal["imagenet", "symmetric"] = "imagenet"  # of pixels; symmetric: x / 127.5 - 1
    tensorflow_padding: bool = False  # for MobileNetV2 weights that were trained in TensorFlow
    seed: int = 0
    workers: int = 2  # threads that decode
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def __post_init__(self):
        if self.seed < 0 or self.workers < 1:
            raise ValueError(f"RunConfig: expected seed of at least 0 and workers of at least 1, got {self.seed} and "
                             f"{self.workers}")  # fmt: skip
        if self.tensorflow_padding and self.network != "mobilenet_v2":
            raise ValueError(f"RunConfig: expected tensorflow_padding with mobilenet_v2, got {self.network}")
        if (self.cycle or self.relabel) and not self.segmenter:
            raise ValueError(f"RunConfig: expected a {'cycle' if self.cycle else 'relabel'} with a segmenter, got "
                             f"segmenter false")  # fmt: skip
        if len({self.masks, *self.compared}) <= len(self.compared):
            raise ValueError(f"RunConfig: expected masks and compared to name each method once, got {self.masks} and "
                             f"{', '.join(self.compared)}")  # fmt: skip

    @classmethod
    def light(cls) -> "RunConfig":
        return cls()

    @classmethod
    def voc(cls) -> "RunConfig":
        """RIB's masks by IRN, and DeepLab-v2 on them, as published."""
        return cls(network="resnet50", size="published", rib="released", masks="irn")

    @classmethod
    def coco(cls) -> "RunConfig":
        return cls(network="resnet50", size="published", rib="coco", masks="irn")

    @classmethod
    def released(cls) -> "RunConfig":
        """As the authors' code runs, on VOC."""
        return cls.voc()

    @classmethod
    def paper(cls) -> "RunConfig":
        """With RIB's constants of the paper."""
        return replace(cls.voc(), rib="paper")

    @classmethod
    def fast(cls) -> "RunConfig":
        """The published networks and sizes; RIB approximated, in 16 bits."""
        return replace(cls.voc(), rib="fast")

    @classmethod
    def drawn(cls) -> "RunConfig":
        """Of `ribfast demo`: drawn pictures and no weights to start from."""
        return cls(network="resnet10", size="tiny", compared=("ppmg",), relabel=True)

    @classmethod
    def shown(cls) -> "RunConfig":
        """Of `ribfast demo --data`: as light, with all that the demo compares."""
        return cls(compared=("ppmg",), relabel=True)


class Stage(NamedTuple):
    name: str  # as --set says it, and of its folder
    command: str
    words: list[str]


STAGES = (
    "classifier", "cam", "rib", "labels", "irn", "masks", "crf", "ppmg", "par", "pamr", "threshold", "segmenter",
    "relabelled", "predicted", "report",
)  # fmt: skip
CHECKPOINTS = {"classifier": "classifier.safetensors", "irn": "irn.safetensors", "segmenter": "segmenter.safetensors"}
ALONE = ("eval", "report")  # commands that processes do not share
SHOWN = 10  # images that are left out, of which the log says why


class Given(NamedTuple):
    """What a run is made of."""

    data: str  # KIND:PATH
    split: str | None
    validation: str | None  # the split that the segmenter predicts; None: the same as split
    out: Path
    weights: Path | None
    classifier: Path | None  # a trained one, in place of the first stage
    fields: dict[str, dict[str, str]]  # of stages, as options say them


def stages(given: Given, config: RunConfig, masked: bool) -> list[Stage]:
    """masked: whether the data has masks, which maps and masks are compared with."""
    here, c = given.out, config
    images = ["--data", given.data, *(["--split", given.split] if given.split else [])]
    works = ["--workers", str(c.workers), "--device", c.device]
    network = ["--network", c.network, "--normalization", c.normalization]
    network += ["--tensorflow-padding"] * c.tensorflow_padding
    start = [] if given.weights is None else ["--weights", str(given.weights)]
    classifier, found = given.classifier or here / "classifier" / CHECKPOINTS["classifier"], []

    def add(name: str, command: str, *words, out: str | None = None) -> Path:
        own = [word for field, value in given.fields.get(name, {}).items() for word in _option(field, value)]
        found.append(Stage(name, command, [*map(str, words), "--out", str(here / (out or name)), *own]))
        return here / name

    def compare(kind: str, folder: Path, *split: str) -> None:
        if masked:
            words = [*(split or images), f"--{kind}", str(folder), "--workers", str(c.workers)]
            found.append(Stage(f"{folder.name} against ground truth", "eval", words))

    if given.classifier is None:
        own = {
            "tiny": ["--lr", "0.02", "--classifier-lr-scale", "3", "--batch", "8", "--epochs", "18",
                     "--long-side", "80,112", "--crop", "96", "--preset", "paper"],
            "small": ["--lr", "0.03" if c.network == "mobilenet_v2" else "0.01", "--epochs", "8", "--long-side",
                      "224,384", "--crop", "288", "--preset", "paper"],
        }.get(c.size, [])  # fmt: skip
        own += ["--no-frozen-trunk"] * (given.weights is None and c.size == "tiny")
        add("classifier", "train-classifier", *images, *network, *own, *start, "--seed", c.seed, *works, "--resume")
    scales = ["--scales", "1.0,2.0"] if c.size == "tiny" else []
    maps = add("cam", "cam", *images, "--checkpoint", classifier, *scales, *works)
    compare("maps", maps)
    if c.rib != "none":
        own = {
            "tiny": [*scales, "--loss-scales", "1.0", "--lr", "6e-4", "--classifier-lr-scale", "1", "--tau", "0.3",
                     "--explode-area", "0.4", "--others-crop", "96", "--others-long-side", "80,112", "--n-others", "8"],
            "small": ["--others-crop", "192", "--others-long-side", "154,269", "--n-others", "8"],
        }.get(c.size, [])  # fmt: skip
        if c.network == "mobilenet_v2":  # whose maps hardly move at the rate of ResNet-50
            own += ["--lr", "3e-5"]
        words = [*images, "--checkpoint", classifier, "--preset", c.rib, *own, "--seed", c.seed, "--steps-kept"]
        maps = add("rib", "rib", *words, *works)
        compare("maps", maps)
    irn = []
    if c.masks == "irn":
        preset = "rib_labels" if c.rib != "none" else "labels"
        labels = add("labels", "masks", *images, "--maps", maps, "--preset", preset, *works)
        own = [] if c.size == "published" else ["--preset", "small"]
        words = [*images, "--labels", labels, *network, *own, "--weights", classifier, "--seed", c.seed]
        add("irn", "train-irn", *words, *works, "--resume")
        irn = ["--irn", str(here / "irn" / CHECKPOINTS["irn"])]
    preset = {"irn": "irn" if c.rib == "none" else "coco" if c.rib == "coco" else "rib"}.get(c.masks, c.masks)
    own = {"ppmg": ["--power", "3"]} if c.size == "tiny" else {}
    words = [*images, "--maps", maps, "--preset", preset, *own.get(c.masks, []), *irn]
    masks = add("masks", "masks", *words, *works)
    compare("masks", masks)
    for method in c.compared:
        words = [*images, "--maps", maps, "--preset", method, *own.get(method, [])]
        compare("masks", add(method, "masks", *words, *works))
    if c.segmenter:
        preset = "coco" if c.rib == "coco" else "voc" if c.size == "published" else "light"
        own = ["--steps", "160", "--lr", "0.01", "--head-lr-scale", "3", "--frozen", "0", "--rescale", "0.8,1.25",
               "--crop", "97", "--save-every", "80"] if c.size == "tiny" else []  # fmt: skip
        looks = ["--validation", given.validation] if given.validation and masked else []
        start = start or ["--weights", str(classifier)]
        add("segmenter", "train-seg", *images, "--masks", masks, "--preset", preset, *network, *own, *start, *looks,
            *(["--cycle"] * c.cycle), "--seed", c.seed, *works, "--resume")  # fmt: skip
        checkpoint = here / "segmenter" / CHECKPOINTS["segmenter"]
        shown = ["--data", given.data, "--split", given.validation] if given.validation else images
        words = ["--checkpoint", checkpoint, *(["--scales", "1.0,1.5", "--crf"] if c.size == "tiny" else []), *works]
        if c.relabel and given.validation:
            compare("masks", add("relabelled", "predict", *images, *words))
        predicted = add("predicted", "predict", *shown, *words)
        compare("masks", predicted, *shown)
    names = {stage.name for stage in found} - ({"predicted"} if given.validation else set())  # those are other images
    compared = [name for name in ("cam", "rib", "masks", *c.compared, "relabelled", "predicted") if name in names]
    words = [word for name in compared for word in ("--stage", f"{name}={here / name}")]
    add("report", "report", *images, *words, "--workers", c.workers, out="report.html")
    return found


def sound(source: data.Source, out: Path, workers: int, *, progress=None) -> Path | None:
    """A list of the images that can be read, where others cannot, whose reasons go into failures.jsonl; else None."""
    listed, failures = out / "images.txt", out / "failures.jsonl"
    if listed.is_file():  # by a run before
        return listed if failures.is_file() else None
    found = data.scan(source, required=False, workers=workers, progress=progress)
    problems = found.problems
    bad = {problem.name for problem in problems}
    good = [item.name for item in source if item.name not in bad]
    if not good:
        raise ValueError(f"run: expected images that can be read, got {len(source)} that cannot; the first: "
                         f"{problems[0].reason}")  # fmt: skip
    if problems:
        files.write(failures, "".join(json.dumps(problem._asdict()) + "\n" for problem in problems).encode())
        for problem in problems[:SHOWN]:
            log.warning("left out: %s: %s", *problem)
        log.warning("left out: %d of %d images; all in %s", len(bad), len(source), failures)
    files.write(listed, "".join(f"{name}\n" for name in good).encode())
    return listed if problems else None


def only(given: Given, field: str, listed: Path) -> Given:
    """With the images of a list alone. field: split or validation."""
    before = getattr(given, field) or ""
    return given._replace(**{field: f"{before.partition(':')[0]}:{listed}" if _is_coco(given) else str(listed)})


def _is_coco(given: Given) -> bool:
    """Whose splits are JSON, which lists only choose from."""
    return given.data.startswith("coco:")


def without_failed(given: Given, out: Path, stage: str, source: data.Source, options) -> Given:
    """What the stages after one go on with, some of whose images failed. options: the stage's."""
    failed = Store(options.out).failures()
    left = out / f"images-after-{stage}.txt"
    files.write(left, "".join(f"{item.name}\n" for item in source if item.name not in failed).encode())
    return only(given, "split" if options.split == given.split else "validation", left)


def has_masks(source: data.Source) -> bool:
    return bool(len(source)) and all(item.mask is not None or item.name in source.drawings for item in source)


def _option(field: str, value: str) -> list[str]:
    name = "--" + field.replace("_", "-")
    if value.lower() in ("true", "false"):
        return [name if value.lower() == "true" else "--no-" + name[2:]]
    return [name, value]
