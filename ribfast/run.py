"""From labelled photographs to masks, a segmenter and its predictions: the other commands, one after another.

Each stage is a command line, which can be run by itself. `runner.py` goes through them.
"""

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

STAGES = (
    "classifier", "cam", "rib", "labels", "irn", "masks", "crf", "ppmg", "par", "pamr", "threshold", "segmenter",
    "relabelled", "predicted", "report",
)  # fmt: skip
CHECKPOINTS = {"classifier": "classifier.safetensors", "irn": "irn.safetensors", "segmenter": "segmenter.safetensors"}
CUTTING = ("crf", "par", "pamr", "threshold")  # methods that cut the maps themselves at a threshold
COCO = {"lr": 5e-6, "tau": 0.5, "n_others": 14}  # what rib's presets have otherwise on COCO, and those that stop:
COCO_STOPS = {"explode_area": 0.8, "stop_logit": 1000.0}


@dataclass(frozen=True)
class RunConfig:
    """The defaults are for some hundreds of photographs and a laptop; --set changes a stage's own fields."""

    # of classifier, segmenter
    network: Literal["resnet10", "resnet18", "resnet50", "resnet101", "mobilenet_v2"] = "mobilenet_v2"
    # crops and passes: for pictures of about 100 pixels, photographs of about 320, or the papers'
    size: Literal["tiny", "small", "published"] = "small"
    rib: Literal["none", "released", "paper", "fast"] = "fast"  # how the classifier is adapted to each image
    constants: Literal["voc", "coco"] = "voc"  # the data set for which RIB's, the walk's and DeepLab's were published
    masks: Literal["crf", "irn", "ppmg", "par", "pamr", "threshold"] = "crf"  # how masks are made of its maps
    # masks of the same maps made otherwise, to compare: some of crf, ppmg, par, pamr, threshold
    compared: tuple[Literal["crf", "ppmg", "par", "pamr", "threshold"], ...] = ()
    # cut maps where that is best against the masks of --split, where it has some; of crf, par, pamr and threshold
    tuned: bool = False
    segmenter: bool = True  # train one on the masks, and predict
    relabel: bool = False  # predict --split's images too where --validation's are predicted, for the report's gallery
    cycle: bool = False  # PMM's: train it again on what it predicts
    normalization: Literal["imagenet", "symmetric"] = "imagenet"  # of pixels; symmetric: x / 127.5 - 1
    tensorflow_padding: bool = False  # for MobileNetV2 weights that were trained in TensorFlow
    seed: int = 0  # of trainings, of the images that RIB draws, of the demo's pictures
    workers: int = 2  # threads that decode
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    # a field of a stage's own configuration, such as rib.steps=5; repeatable
    set: tuple[str, ...] = dataclasses.field(default=(), metadata={"each": "STAGE.FIELD=VALUE"})

    def __post_init__(self):
        if self.seed < 0 or self.workers < 1:
            raise ValueError(f"RunConfig: expected seed of at least 0 and workers of at least 1, got {self.seed} and "
                             f"{self.workers}")  # fmt: skip
        if self.tensorflow_padding and self.network != "mobilenet_v2":
            raise ValueError(f"RunConfig: expected tensorflow_padding with mobilenet_v2, got {self.network}")
        if self.cycle and not self.segmenter:
            raise ValueError("RunConfig: expected a cycle with a segmenter, got segmenter false")
        if len({self.masks, *self.compared}) <= len(self.compared):
            raise ValueError(f"RunConfig: expected masks and compared to name each method once, got {self.masks} and "
                             f"{', '.join(self.compared)}")  # fmt: skip
        self.fields()

    def fields(self) -> dict[str, dict[str, str]]:
        """What `set` says: by stage and field, as options say it."""
        found = {}
        for word in self.set:
            place, equals, value = word.partition("=")
            stage, dot, field = place.partition(".")
            if not (equals and dot and field) or stage not in STAGES:
                raise ValueError(f"expected --set STAGE.FIELD=VALUE with a stage of {', '.join(STAGES)}, got {word!r}")
            found.setdefault(stage, {})[field] = value
        return found

    @classmethod
    def light(cls) -> "RunConfig":
        return cls()

    @classmethod
    def voc(cls) -> "RunConfig":
        """RIB's masks by IRN, and DeepLab-v2 on them, as published."""
        return cls(network="resnet50", size="published", rib="released", masks="irn")

    @classmethod
    def coco(cls) -> "RunConfig":
        return replace(cls.voc(), constants="coco")

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


class Given(NamedTuple):
    """What a run is made of, beside its configuration."""

    data: str  # KIND:PATH
    split: str | None
    validation: str | None  # the split that the segmenter predicts; None: the same as split
    out: Path
    weights: Path | None
    classifier: Path | None  # a trained one, in place of the first stage


class Facts(NamedTuple):
    """Of the data, what stages depend on."""

    images: int  # of split
    masked: bool  # whether split has masks, with which its maps and masks are compared
    validation_masked: bool = False


class Stage(NamedTuple):
    name: str  # as --set says it, and of its folder
    command: str
    part: Literal["split", "validation"]  # whose images it is given
    words: tuple[str, ...]  # beside those that say the images
    of: tuple[str, ...] = ()  # the stages whose results it reads of each image

    def line(self, given: Given, listed: str | None = None) -> list[str]:
        """Its command's words. listed: the split with fewer images."""
        split = listed or getattr(given, self.part)
        return ["--data", given.data, *(["--split", split] if split else []), *self.words]


def stages(given: Given, config: RunConfig, facts: Facts) -> list[Stage]:
    here, c, fields = given.out, config, config.fields()
    works = ["--workers", c.workers, "--device", c.device]
    network = ["--network", c.network, "--normalization", c.normalization]
    network += ["--tensorflow-padding"] * c.tensorflow_padding
    start = [] if given.weights is None else ["--weights", given.weights]
    classifier, found = given.classifier or here / "classifier" / CHECKPOINTS["classifier"], []
    unseen = given.validation is not None

    def add(name: str, command: str, *words, part: str = "split", of=(), out: str | None = None) -> Path:
        own = [word for field, value in fields.get(name, {}).items() for word in _option(field, value)]
        words = (*map(str, words), "--out", str(here / (out or name)), *own)
        found.append(Stage(name, command, part, words, tuple(of)))
        return here / name

    def compare(kind: str, folder: Path, part: str = "split") -> None:
        if facts.masked if part == "split" else facts.validation_masked:
            words = (f"--{kind}", str(folder), "--workers", str(c.workers))
            found.append(Stage(f"{folder.name} against ground truth", "eval", part, words, (folder.name,)))

    if given.classifier is None:
        own = {
            "tiny": ["--lr", "0.02", "--classifier-lr-scale", "3", "--batch", "8", "--epochs", "18",
                     "--long-side", "80,112", "--crop", "96", "--momentum", "0.9"],
            "small": ["--lr", "0.03" if c.network == "mobilenet_v2" else "0.01", "--epochs", "8", "--long-side",
                      "224,384", "--crop", "288", "--momentum", "0.9"],
        }.get(c.size, [])  # fmt: skip
        own += ["--no-frozen-trunk"] * (given.weights is None)  # else it would stay random
        add("classifier", "train-classifier", *network, *own, *start, "--seed", c.seed, *works, "--resume")
    scales = ["--scales", "1.0,2.0"] if c.size == "tiny" else []
    maps = add("cam", "cam", "--checkpoint", classifier, *scales, *works)
    compare("maps", maps)
    if c.rib != "none":
        words = ["--checkpoint", classifier, *_rib(c, scales), "--seed", c.seed, "--steps-kept", *works]
        maps = add("rib", "rib", *words)
        compare("maps", maps)
    irn = []
    if c.masks == "irn":
        preset = "rib_labels" if c.rib != "none" else "labels"
        labels = add("labels", "masks", "--maps", maps, "--preset", preset, *works, of=[maps.name])
        own = [] if c.size == "published" else ["--preset", "small"]
        words = ["--labels", labels, *network, *own, "--weights", classifier, "--seed", c.seed, *works, "--resume"]
        irn = ["--irn", add("irn", "train-irn", *words, of=["labels"]) / CHECKPOINTS["irn"]]
    own = {"ppmg": ["--power", "3"]} if c.size == "tiny" else {}
    tuned = ["--background-from", maps / "evaluation.json"] if c.tuned and facts.masked else []
    for method in (c.masks, *c.compared):
        preset = {"irn": "irn" if c.rib == "none" else "coco" if c.constants == "coco" else "rib"}.get(method, method)
        words = ["--maps", maps, "--preset", preset, *own.get(method, []), *(tuned if method in CUTTING else [])]
        first = method == c.masks
        made = add("masks" if first else method, "masks", *words, *(irn if first else []), *works, of=[maps.name])
        compare("masks", made)
    if c.segmenter:
        preset = "light" if c.size != "published" else c.constants
        own = ["--steps", max(40, min(160, facts.images)), "--lr", "0.004", "--head-lr-scale", "3", "--frozen", "0",
               "--rescale", "0.8,1.25", "--crop", "97", "--save-every", "80"] if c.size == "tiny" else []  # fmt: skip
        looks = ["--validation", given.validation] if unseen and facts.validation_masked else []
        start = start or ["--weights", classifier]
        add("segmenter", "train-seg", "--masks", here / "masks", "--preset", preset, *network, *own, *start, *looks,
            *(["--cycle"] * c.cycle), "--seed", c.seed, *works, "--resume", of=["masks"])  # fmt: skip
        checkpoint = here / "segmenter" / CHECKPOINTS["segmenter"]
        words = ["--checkpoint", checkpoint, *(["--scales", "1.0,1.5", "--crf"] if c.size == "tiny" else []), *works]
        if c.relabel and unseen:
            compare("masks", add("relabelled", "predict", *words))
        part = "validation" if unseen else "split"
        compare("masks", add("predicted", "predict", *words, part=part), part)
    parts = {stage.name: stage.part for stage in found}
    shown = [name for name in ("cam", "rib", "masks", *c.compared, "relabelled", "predicted") if name in parts]
    words = [word for name in shown for word in ("--stage", f"{name}={here / name}")]
    if parts.get("predicted") == "validation":
        words += ["--split-of", f"predicted={given.validation}"]
    words += [word for name in CHECKPOINTS if name in parts for word in ("--training", f"{name}={here / name}")]
    of = [name for name in shown if parts[name] == "split"]
    add("report", "report", *words, "--run", here, "--workers", c.workers, of=of, out="report.html")
    return found


def _rib(c: RunConfig, scales: list[str]) -> list[str]:
    own = {
        "tiny": [*scales, "--loss-scales", "1.0", "--lr", "6e-4", "--classifier-lr-scale", "1", "--tau", "0.3",
                 "--explode-area", "0.4", "--others-crop", "96", "--others-long-side", "80,112", "--n-others", "8"],
        "small": ["--others-crop", "192", "--others-long-side", "154,269", "--n-others", "8"],
    }.get(c.size, [])  # fmt: skip
    if c.constants == "coco":
        changed = COCO | (COCO_STOPS if c.rib != "paper" else {})
        own = [word for field, value in changed.items() for word in _option(field, str(value))] + own
    if c.network == "mobilenet_v2":  # whose maps hardly move at the rate of ResNet-50
        own += ["--lr", "3e-5"]
    return ["--preset", c.rib, *own]


def _option(field: str, value: str) -> list[str]:
    name = "--" + field.replace("_", "-")
    if value.lower() in ("true", "false"):
        return [name if value.lower() == "true" else "--no-" + name[2:]]
    return [name, value]
