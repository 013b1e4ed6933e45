"""Training the segmentation network on masks, with or without pretended under-fitting (Li et al. 2021)."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, distributed, nn

from .. import data, models, ops
from ..metrics import Confusion
from ..processes import Processes, processes, rank_and_world, together
from ..segment import label_probabilities
from . import inputs, loop

log = logging.getLogger("ribfast")
CHECKPOINT, BEST = "segmenter.safetensors", "best.safetensors"


@dataclass(frozen=True)
class SegmentationConfig:
    """The defaults are DeepLab-v2's on VOC."""

    network: Literal["resnet10", "resnet18", "resnet50", "resnet101", "mobilenet_v2"] = "resnet101"  # its backbone
    steps: int = 20000  # batches that it trains on
    batch: int = 10  # images a step, of all processes together; the last ones that fill no batch are left out
    parts: int = 1  # of a process's share of a batch, one after another, to save memory
    lr: float = 2.5e-4  # learning rate of the backbone at the start
    head_lr_scale: float = 10.0  # the heads' learning rate is so many times the backbone's; their biases' twice that
    weight_decay: float = 5e-4  # not of the heads' biases
    momentum: float = 0.9  # of SGD
    power: float = 0.9  # learning rate = lr * (1 - step / steps) ** power
    rescale: tuple[float, float] = (0.5, 1.5)  # photographs are rescaled by a factor between these
    crop: int = 321  # side of the crops
    flip: bool = True  # mirror every second photograph
    frozen: int = 0  # so many of the backbone's five depths do not train, from the first
    train_norms: bool = False  # batch normalisation's scales and shifts too; its statistics stay as they are
    balanced: bool = False  # background's pixels and the others' are averaged apart
    # pretended under-fitting: pixels whose loss is large once the mean is below beta are taken for wrong labels, and
    # their loss l becomes min(l, k), or 0 where it exceeds k, or l ** k
    under_fitting: Literal["clamp", "ignore", "pow"] | None = None
    beta: float = 0.5  # of under_fitting
    k: float = 0.5  # of under_fitting
    auxiliary: float = 0.0  # weight of a second head's loss, on the last but one depth; 0: there is none
    choose: Literal["last", "best"] = "last"  # weights that are kept; best: on the validation split's ground truth
    save_every: int = 1000  # steps; there a stopped training goes on, and the validation is looked at
    normalization: Literal["imagenet", "symmetric", "caffe"] = "imagenet"  # of pixels; symmetric: x / 127.5 - 1
    tensorflow_padding: bool = False  # for MobileNetV2 weights that were trained in TensorFlow
    caffe: bool = False  # ResNets' layers are Caffe's, for deeplab-pytorch's weights; with normalization caffe
    # bfloat16: under autocast; weights, losses and updates stay float32
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False  # by torch.compile
    graphs: bool = True  # on a GPU, the network's kernels are launched as CUDA graphs
    deterministic: bool = False  # on a GPU, algorithms that add in a fixed order, wherever there are such
    seed: int = 0  # of the heads' weights, the order of the images and their crops
    cache_mib: int = 0  # of decoded images that are kept
    workers: int = 4  # threads that decode; results do not depend on them
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def __post_init__(self):
        loop.check(self)
        for name in ("parts", "crop", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"SegmentationConfig: expected {name} of at least 1, got {getattr(self, name)}")
        if not 0 < self.k < math.inf or (self.under_fitting == "pow" and self.k > 1):
            raise ValueError(f"SegmentationConfig: expected k above 0, and at most 1 as a power, got {self.k}")
        for name in ("head_lr_scale", "beta", "auxiliary", "frozen", "cache_mib"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"SegmentationConfig: expected {name} of at least 0, got {getattr(self, name)}")
        if self.frozen > 5:
            raise ValueError(f"SegmentationConfig: expected at most 5 frozen depths, got {self.frozen}")
        if self.batch % self.parts:
            raise ValueError(
                f"SegmentationConfig: expected a batch that {self.parts} parts can share, got {self.batch}"
            )
        self.augmentation()
        if self.caffe and self.network not in ("resnet50", "resnet101"):
            raise ValueError(f"SegmentationConfig: expected caffe with resnet50 or resnet101, got {self.network}")
        if self.caffe != (self.normalization == "caffe"):
            raise ValueError(f"SegmentationConfig: expected caffe and normalization caffe together, got {self.caffe} "
                             f"and {self.normalization}")  # fmt: skip

    def augmentation(self) -> data.Augmentation:
        return loop.augmentation(self)

    @classmethod
    def voc(cls) -> "SegmentationConfig":
        return cls()

    @classmethod
    def coco(cls) -> "SegmentationConfig":
        return cls(steps=100000, crop=481, beta=0.8, k=0.8)

    @classmethod
    def pmm(cls) -> "SegmentationConfig":
        """With pretended under-fitting, on both heads."""
        return cls(under_fitting="clamp", auxiliary=0.4)

    @classmethod
    def pmm_coco(cls) -> "SegmentationConfig":
        return cls(steps=100000, crop=481, under_fitting="clamp", beta=0.8, k=0.8, auxiliary=0.4)

    @classmethod
    def light(cls) -> "SegmentationConfig":
        """For some hundreds of photographs of about 320 pixels, without a GPU."""
        return cls(
            network="mobilenet_v2", steps=1000, batch=8, lr=0.003, weight_decay=1e-4, crop=257, frozen=2,
            train_norms=True, save_every=250,
        )  # fmt: skip


def train_segmenter(
    source: data.Source,
    config: SegmentationConfig,
    out: str | Path,
    *,
    labels: inputs.Labels | None = None,
    weights: str | Path | None = None,
    validation: data.Source | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: loop.Progress | None = None,
    scanned: loop.Progress | None = None,
    begun: loop.Begun | None = None,
) -> Path:
    """Trains DeepLab-v2, or MobileNetV2 with a light head, and returns the checkpoint, which models.open_segmenter
    opens.

    labels: each image's mask by its name, (H, W) uint8: 0 background, class + 1, 255 ignored, from a function, a
    mapping, or a folder of NAME.png; None: the source's own masks. weights: the backbone to start from, of ImageNet, a
    classifier or deeplab-pytorch. validation: images with masks, whose mIoU is reported at every pause; the last
    weights are kept all the same, unless choose says otherwise. resume: goes on after the last pause in `out`, if there
    is one; overwrite: replaces what is there; without either, a training there is an error. Under torchrun the
    processes share each batch. Every image and mask is looked at first, which `scanned` reports. begun: called with
    digests of the inputs once nothing is wrong, before anything is written. Writes segmenter.safetensors and
    metrics.jsonl.
    """
    if not len(source):
        raise ValueError("train_segmenter: expected images, got none")
    if config.choose == "best" and validation is None:
        raise ValueError("train_segmenter: expected a validation split to choose the best weights on, got none")
    if validation is not None and validation.classes != source.classes:
        raise ValueError("train_segmenter: expected a validation split of the same classes, got others")
    reader = None if labels is None else inputs.reader("train_segmenter", source, labels)
    if reader is None:
        _refuse_unmasked(source)
    given = inputs.digests(source, weights, labels=labels)
    if config.choose == "best":
        given["validation"] = validation.digest()
    task = _Segmentation(source, reader, config, weights, validation, Path(out), given, scanned)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    with processes(config.device) as here, _deterministic(config, here):
        return loop.train(task, Path(out), here, resume=resume, overwrite=overwrite, progress=progress, begun=begun)


def refuse_begun(op: str, out: str | Path) -> None:
    """Refuses an `out` where a training was begun or has ended."""
    loop.refuse_begun(op, Path(out), CHECKPOINT)


def is_begun(out: str | Path) -> bool:
    """Whether a training in `out` was begun or has ended."""
    return any((Path(out) / name).is_file() for name in (CHECKPOINT, loop.UNFINISHED))


def clear_segmenter(out: str | Path) -> None:
    """Removes what a training left in `out`."""
    loop.clear(Path(out), CHECKPOINT, BEST)


def _refuse_unmasked(source: data.Source) -> None:
    missing = [item.name for item in source if item.mask is None and item.name not in source.drawings]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"train_segmenter: expected masks of {len(source)} images, got none of "
                         f"{', '.join(missing[:3])}{more}; name the folder of those to train on")  # fmt: skip


@contextlib.contextmanager
def _deterministic(config: SegmentationConfig, here: Processes) -> Iterator[None]:
    if not config.deterministic or here.device.type != "cuda":
        yield
        return
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


class _Segmentation:
    """The task of `loop`."""

    name, checkpoint, idle = "train_segmenter", CHECKPOINT, False

    def __init__(self, source, labels, config, weights, validation, out, inputs, scanned):
        self.source, self.labels, self.config, self.weights, self.inputs = source, labels, config, weights, inputs
        self.validation, self.out, self.scanned = validation, out, scanned
        self.images, self.parts, self.augmentation = len(source), config.parts, config.augmentation()
        self.files, self.indifferent = (BEST,), () if config.under_fitting else ("parts",)
        self.cache = data.ImageCache(source, config.cache_mib << 20)
        self.chosen = {}  # what the checkpoint says of how its weights were chosen

    def schedule(self, per_epoch: int) -> loop.Schedule:
        return loop.Schedule(self.config.steps, self.config.save_every)

    def inspect(self, here: Processes) -> None:
        found = inputs.look(self.name, self.source, self.labels, self.config.workers, here, self.scanned)
        if (absent := found.absent()) and here.rank == 0:
            more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
            log.warning("no pixel is of %s%s: these classes will not be learnt", ", ".join(absent[:5]), more)
        if self.validation is not None:
            inputs.look(self.name, self.validation, None, self.config.workers, here)

    def begin(self, filled: bool) -> None:
        c = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(c.seed)
            self.model = models.segmenter(
                c.network, len(self.source.classes), tensorflow_padding=c.tensorflow_padding, caffe=c.caffe,
                auxiliary=c.auxiliary > 0,
            )  # fmt: skip
        self.model.classes, self.model.backbone.normalization = self.source.classes, c.normalization
        self.model.freeze(c.frozen, not c.train_norms)
        if filled:
            return
        if self.weights is None:
            if rank_and_world()[0] == 0:
                log.warning("no weights to start from: the backbone begins with random ones")
        else:
            inputs.check_weights(self.name, self.weights, self.model.metadata())
            self.model.fill(models.load_checkpoint(self.weights), heads=False, path=self.weights)

    def groups(self) -> list[dict]:
        """As Caffe's DeepLab has them: biases of the heads at twice their rate, without decay."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        backbone = [p for name, p in trained.items() if name.startswith("backbone.")]
        heads = {name: p for name, p in trained.items() if not name.startswith("backbone.")}
        weights, biases = ([p for n, p in heads.items() if n.endswith(".bias") == bias] for bias in (False, True))
        scale = self.config.head_lr_scale
        groups = [{"params": weights, "scale": scale}, {"params": biases, "scale": 2 * scale, "weight_decay": 0.0}]
        return [{"params": backbone, "scale": 1.0}, *groups] if backbone else groups

    def prepared(self, here: Processes, images: int) -> nn.Module:
        c, graphed = self.config, self.config.graphs and here.device.type == "cuda"
        if c.compile:
            return torch.compile(self.model, mode="reduce-overhead" if graphed else None)
        if not graphed:
            return self.model
        example = torch.zeros(images, 3, c.crop, c.crop, device=here.device).contiguous(
            memory_format=torch.channels_last
        )
        with torch.autocast("cuda", torch.bfloat16, enabled=c.precision == "bfloat16", cache_enabled=False):
            return torch.cuda.make_graphed_callables(self.model, (example,))

    def load(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        item = self.source[index]
        try:
            labels = self.source.mask(item) if self.labels is None else self.labels(item.name)
            return self.augmentation.with_labels(self.cache.image(item), labels, rng)
        except ValueError as error:
            raise ValueError(f"train_segmenter: {item.name}: {error}") from error

    def begin_step(self, step: int, batch: list[Tensor], here: Processes) -> None:
        """The pixels that losses are averaged over: of the whole batch."""
        labels = batch[1]
        foreground = ((labels > 0) & (labels <= self.model.n_classes)).sum()
        self.counts = torch.stack([torch.full_like(foreground, labels.numel()), (labels == 0).sum(), foreground])
        self.counts = self.counts.double()
        if here.world > 1:
            distributed.all_reduce(self.counts)

    def losses(self, forward, part: list[Tensor], here: Processes) -> dict[str, Tensor]:
        (images, labels), c = part, self.config
        reduce = distributed.all_reduce if here.world > 1 and c.under_fitting is not None else None
        if c.compile and here.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        with loop.autocast(c, here):
            logits = forward(images)
        own = [
            ops.segmentation_loss(
                each, labels, under_fitting=c.under_fitting, beta=c.beta, k=c.k, balanced=c.balanced,
                counts=self.counts, world=here.world, reduce=reduce,
            )
            for each in logits
        ]  # fmt: skip
        if len(own) == 1:
            return {"loss": own[0]}
        return {"loss": own[0] + c.auxiliary * own[1], "main": own[0], "auxiliary": own[1]}

    def pause(self, steps: int, here: Processes) -> dict[str, float]:
        if self.validation is None:
            return {}
        miou = self._validate(here)
        if self.config.choose == "best" and here.rank == 0:
            path = self.out / BEST
            if not path.is_file() or miou > float(models.read_metadata(path)["validation_miou"]):
                found = {"steps": str(steps), "validation_miou": repr(miou)}
                models.save_checkpoint(path, self.tensors(), self.metadata() | found)
        return {"validation_miou": miou}

    def _validate(self, here: Processes) -> float:
        """mIoU of the validation's photographs at their size."""
        confusion = Confusion(len(self.source.classes))
        mine = [self.validation[index] for index in range(here.rank, len(self.validation), here.world)]

        def load(item: data.Item):
            image = self.validation.image(item)
            return image, self.validation.mask(item, image.shape[:2])

        self.model.eval()
        for image, mask in data.prefetch(load, mine, workers=self.config.workers):
            with loop.autocast(self.config, here):
                (found,) = label_probabilities(self.model, [image], mirror=False)
            confusion.add(found.argmax(0).byte().cpu().numpy(), mask)
        self.model.train()
        confusion.matrix = sum(together(here, confusion.matrix))
        return confusion.miou()

    def finish(self, here: Processes) -> None:
        if self.config.choose == "last":
            self.chosen = {"chosen": "last"}
            return
        together(here)
        path = self.out / BEST
        known = models.read_metadata(path)
        self.chosen = {"chosen": "best on the validation's ground truth"} | {
            name: known[name] for name in ("steps", "validation_miou")
        }
        self.fill(models.load_checkpoint(path))
        if here.rank == 0:
            log.warning("kept the weights after step %s, the best of %d on the validation's ground truth (mIoU %.4f), "
                        "which says too much of that split", known["steps"],
                        -(-self.config.steps // self.config.save_every), float(known["validation_miou"]))  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        return self.model.tensors()

    def fill(self, state: dict[str, Tensor]) -> None:
        self.model.fill(state)

    def result(self) -> dict[str, Tensor]:
        return self.tensors()

    def metadata(self) -> dict[str, str]:
        return self.model.metadata() | self.chosen

    def others(self, known: dict[str, str]) -> list[str]:
        return [] if json.loads(known.get("classes", "null")) == list(self.source.classes) else ["the classes"]
