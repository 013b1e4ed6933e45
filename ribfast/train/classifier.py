"""Training the classifier of image-level labels whose maps everything starts from."""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import data, metrics, models
from ..processes import Processes, processes, together
from . import inputs, loop

log = logging.getLogger("ribfast")
CHECKPOINT = "classifier.safetensors"
MEASURED = 64  # images that batch normalisation's statistics are taken from, where no weights bring them


@dataclass(frozen=True)
class ClassifierConfig:
    """The defaults are what RIB's released code trains with."""

    # the classifier's backbone
    network: Literal["resnet10", "resnet18", "resnet50", "resnet101", "mobilenet_v2"] = "resnet50"
    epochs: int = 5  # passes over the images
    batch: int = 16  # images a step, of all processes together; the last ones that fill no batch are left out
    lr: float = 0.1  # learning rate of the backbone at the start
    classifier_lr_scale: float = 10.0  # the classifier's learning rate is so many times the backbone's
    weight_decay: float = 1e-4  # of SGD, of all that trains
    momentum: float = 1e-4  # the released code passes its weight decay here; paper: 0.9
    power: float = 0.9  # learning rate = lr * (1 - step / steps) ** power
    long_side: tuple[int, int] = (320, 640)  # photographs are rescaled to a longer side between these
    crop: int = 512  # side of the crops
    flip: bool = True  # mirror every second photograph
    normalization: Literal["imagenet", "symmetric"] = "imagenet"  # of its pixels; symmetric: x / 127.5 - 1
    tensorflow_padding: bool = False  # for MobileNetV2 weights that were trained in TensorFlow
    # layers up to stride 8 stay as they are; false: they train too, and where there are no weights to start from, batch
    # normalisation's statistics, which are constants all the same, are taken from the first images
    frozen_trunk: bool = True
    # bfloat16: under autocast, the frozen layers too, as they take a third of a step and their rounding is the same in
    # every epoch; weights, pooling, loss and updates stay float32
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0  # of the classifier's weights, the order of the images and their crops
    workers: int = 4  # threads that decode; results do not depend on them
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    # bce: from the labels alone; eader: with adversarial erasing. Each has options of its own, which --help lists after
    # it
    method: Literal["bce"] = "bce"

    def __post_init__(self):
        loop.check(self)
        kind = type(self).__name__
        if self.crop < 1:
            raise ValueError(f"{kind}: expected crop of at least 1, got {self.crop}")
        if not 0 <= self.classifier_lr_scale < math.inf:
            raise ValueError(f"{kind}: expected classifier_lr_scale of at least 0, got {self.classifier_lr_scale}")
        self.augmentation()

    def augmentation(self) -> data.Augmentation:
        return data.Augmentation(self.long_side, self.crop, self.flip, data.NORMALIZATIONS[self.normalization])

    @classmethod
    def released(cls) -> "ClassifierConfig":
        return cls()

    @classmethod
    def paper(cls) -> "ClassifierConfig":
        return cls(momentum=0.9)


def train_classifier(
    source: data.Source,
    config: ClassifierConfig,
    out: str | Path,
    *,
    weights: str | Path | None = None,
    validation: data.Source | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: loop.Progress | None = None,
    scanned: loop.Progress | None = None,
    begun: loop.Begun | None = None,
) -> Path:
    """Trains on a source's image-level labels and returns the checkpoint, which models.open_classifier opens.

    weights: the backbone to start from. validation: its loss and mean average precision follow every epoch. resume:
    goes on after the last whole epoch in `out`, if there is one; overwrite: replaces what is there; without either, a
    training there is an error. Every image is looked at first, which `scanned`
    reports. begun: called with digests of the inputs once nothing is wrong, before anything is written. Under torchrun
    the processes share each batch. Writes classifier.safetensors and metrics.jsonl.
    """
    task = ClassifierTask(source, config, weights, validation, scanned)
    with processes(config.device) as here:
        return loop.train(task, Path(out), here, resume=resume, overwrite=overwrite, progress=progress, begun=begun)


class _Whole(nn.Module):
    """A classifier whose trunk has gradients too."""

    def __init__(self, classifier: models.CamClassifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.through(images)


class ClassifierTask:
    """The task of `loop`."""

    parts, files, indifferent, idle = 1, (), (), False
    name, checkpoint, method = "train_classifier", CHECKPOINT, "bce"

    def __init__(self, source, config, weights, validation, scanned=None):
        if config.method != self.method:
            raise ValueError(f"{self.name}: expected a configuration of method {self.method}, got {config.method}; "
                             f"train it by its own function")  # fmt: skip
        self.source, self.config, self.images, self.labels = source, config, len(source), self._labels(source)
        if validation is not None and validation.classes != source.classes:
            raise ValueError(f"{self.name}: expected a validation split of the same classes, got others")
        self.validation, self.weights, self.augmentation = validation, weights, config.augmentation()
        self.scanned = scanned
        self.inputs = inputs.digests(source, weights)

    def _labels(self, source: data.Source) -> Tensor:
        """(N, C) float, once every class has an image."""
        labels = source.labels()
        if not len(labels) or not labels.any():
            raise ValueError(f"{self.name}: expected images with labels, got {len(labels)} without any")
        absent = [name for name, count in zip(source.classes, labels.sum(0).tolist(), strict=True) if not count]
        if absent:
            raise ValueError(f"{self.name}: expected images of every class, got none of {', '.join(absent[:5])}"
                             f"{f' and {len(absent) - 5} more' if len(absent) > 5 else ''}")  # fmt: skip
        return labels.float()

    def inspect(self, here: Processes) -> None:
        inputs.look(self.name, self.source, None, self.config.workers, here, self.scanned, masked=False)
        if self.validation is not None:
            inputs.look(self.name, self.validation, None, self.config.workers, here, masked=False)

    def begin(self, filled: bool) -> None:
        c = self.config
        self.classifier = self.network(c.network, c.normalization, c.tensorflow_padding, c.seed)
        self.model = self.classifier
        if not c.frozen_trunk:
            self.classifier.whole()
        if not filled:
            self.start(self.classifier, self.weights)

    def network(self, name: str, normalization: str, tensorflow_padding: bool, seed: int) -> models.CamClassifier:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            classes = self.source.classes
            made = models.cam_classifier(name, len(classes), tensorflow_padding=tensorflow_padding)
        made.classes, made.normalization = classes, normalization
        return made

    def start(self, network: models.CamClassifier, weights: str | Path | None, role: str = "") -> None:
        """Fills its backbone. role: of another network than the classifier, what its fields begin with."""
        if weights is None and not self.config.frozen_trunk:
            network.measure(self._first_images())
            return
        if weights is None:
            log.warning("no %sweights to start from: the layers up to stride 8 stay random", role and f"{role}_")
            return
        inputs.check_weights(self.name, weights, network.metadata(), role)
        models.load_into(network, models.load_checkpoint(weights), classifier=False, path=weights)

    def _first_images(self) -> Tensor:
        """(N, 3, crop, crop) of a drawn order, the same for every process."""
        rng = np.random.default_rng(self.config.seed)
        chosen = rng.permutation(self.images)[:MEASURED].tolist()
        return torch.stack([self.augmentation(self.source.image(self.source[index]), rng) for index in chosen])

    def schedule(self, per_epoch: int) -> loop.Schedule:
        return loop.Schedule(self.config.epochs * per_epoch, per_epoch)

    def groups(self) -> list[dict]:
        backbone, head = self.classifier.trained_parameters()
        return [{"params": backbone, "scale": 1.0}, {"params": head, "scale": self.config.classifier_lr_scale}]

    def load(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        return self.augmentation(self.source.image(self.source[index]), rng), self.labels[index]

    def prepared(self, here: Processes, images: int) -> nn.Module:
        return self.model if self.config.frozen_trunk else _Whole(self.classifier)

    def begin_step(self, step: int, batch: list[Tensor], here: Processes) -> None:
        pass

    def losses(self, forward, batch, here: Processes) -> dict[str, Tensor]:
        images, targets = batch
        with loop.autocast(self.config, here):
            maps = forward(images)
        return {"loss": F.multilabel_soft_margin_loss(maps.float().mean((2, 3)), targets)}

    @torch.no_grad()
    def pause(self, steps: int, here: Processes) -> dict[str, float]:
        """Of the validation's photographs whole, at their size unless it exceeds the training's, with their mirrors."""
        if self.validation is None:
            return {}
        largest, normalization = self.config.long_side[1], data.NORMALIZATIONS[self.config.normalization]

        def load(index: int) -> Tensor:
            image = self.validation.image(self.validation[index])
            return data.make_views(image, (min(1.0, largest / max(image.shape[:2])),), normalization)[0]

        mine, scores = range(here.rank, len(self.validation), here.world), []
        for views in data.prefetch(load, mine, workers=self.config.workers):
            (views,) = loop.to_device((views,), here)
            with loop.autocast(self.config, here):
                scores.append(self.classifier(views).float().mean((0, 2, 3)).cpu())
        gathered = together(here, (list(mine), scores))
        by_index = {i: score for indices, part in gathered for i, score in zip(indices, part, strict=True)}
        scores, labels = torch.stack([by_index[i] for i in range(len(self.validation))]), self.validation.labels()
        loss = F.multilabel_soft_margin_loss(scores, labels.float()).item()
        return {"validation_loss": loss, "validation_map": float(np.nanmean(_precision(scores, labels)))}

    def finish(self, here: Processes) -> None:
        pass

    def tensors(self) -> dict[str, Tensor]:
        return {n: value for n, value in self.classifier.state_dict().items() if not n.endswith("num_batches_tracked")}

    def fill(self, state: dict[str, Tensor]) -> None:
        models.load_into(self.classifier, state)

    def result(self) -> dict[str, Tensor]:
        return self.tensors()

    def metadata(self) -> dict[str, str]:
        return self.classifier.metadata()

    def others(self, known: dict[str, str]) -> list[str]:
        return ["the classes"] if json.loads(known.get("classes", "null")) != list(self.source.classes) else []


def _precision(scores: Tensor, labels: Tensor) -> np.ndarray:
    return metrics.average_precision(scores.numpy(), labels.numpy())
