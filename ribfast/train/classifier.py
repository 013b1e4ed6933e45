"""Training the classifier of image-level labels whose maps everything starts from."""

import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from .. import config as configuration
from .. import data, metrics, models
from ..processes import Processes, processes
from .journal import Journal

log = logging.getLogger("ribfast")
CHECKPOINT, UNFINISHED = "classifier.safetensors", "unfinished.safetensors"
INDIFFERENT = ("workers", "device")  # fields that may change when a training goes on


@dataclass(frozen=True)
class ClassifierConfig:
    """The defaults are what RIB's released code trains with."""

    network: Literal["resnet18", "resnet50", "resnet101", "mobilenet_v2"] = "resnet50"  # the classifier's backbone
    epochs: int = 5  # passes over the images
    batch: int = 16  # images a step, of all processes together; the last ones that fill no batch are left out
    lr: float = 0.1  # learning rate of the backbone at the start
    classifier_lr_scale: float = 10.0  # the classifier's learning rate is so many times the backbone's
    weight_decay: float = 1e-4
    momentum: float = 1e-4  # the released code passes its weight decay here; paper: 0.9
    power: float = 0.9  # learning rate = lr * (1 - step / steps) ** power
    long_side: tuple[int, int] = (320, 640)  # photographs are rescaled to a longer side between these
    crop: int = 512  # side of the crops
    flip: bool = True  # mirror every second photograph
    normalization: Literal["imagenet", "symmetric"] = "imagenet"  # of pixels; symmetric: x / 127.5 - 1
    tensorflow_padding: bool = False  # for MobileNetV2 weights that were trained in TensorFlow
    # bfloat16: under autocast, the frozen layers too, as they take a third of a step and their rounding is the same in
    # every epoch; weights, pooling, loss and updates stay float32
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0  # of the classifier's weights, the order of the images and their crops
    workers: int = 4  # threads that decode; results do not depend on them
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def __post_init__(self):
        for name in ("epochs", "batch", "crop"):
            if getattr(self, name) < 1:
                raise ValueError(f"ClassifierConfig: expected {name} of at least 1, got {getattr(self, name)}")
        for name in ("lr", "classifier_lr_scale", "weight_decay", "momentum", "power", "seed", "workers"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"ClassifierConfig: expected {name} of at least 0, got {getattr(self, name)}")
        self.augmentation()
        if self.tensorflow_padding and self.network != "mobilenet_v2":
            raise ValueError(f"ClassifierConfig: expected tensorflow_padding with mobilenet_v2, got {self.network}")

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
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Trains on a source's image-level labels and returns the checkpoint, which models.open_classifier opens.

    weights: the backbone to start from. validation: its loss and mean average precision follow every epoch. resume:
    goes on after the last whole epoch in `out`, if there is one. Under torchrun the processes share each batch.
    Writes classifier.safetensors and metrics.jsonl.
    """
    out = Path(out)
    labels = _labels(source)
    if validation is not None and validation.classes != source.classes:
        raise ValueError("train_classifier: expected a validation split of the same classes, got others")
    with processes(config.device) as here:
        return _Training(source, labels, config, out, weights, validation, resume, here).run(progress)


def _labels(source: data.Source) -> Tensor:
    """(N, C) float, once every class has an image."""
    labels = source.labels()
    if not len(labels) or not labels.any():
        raise ValueError(f"train_classifier: expected images with labels, got {len(labels)} without any")
    absent = [name for name, count in zip(source.classes, labels.sum(0).tolist(), strict=True) if not count]
    if absent:
        raise ValueError(f"train_classifier: expected images of every class, got none of {', '.join(absent[:5])}"
                         f"{f' and {len(absent) - 5} more' if len(absent) > 5 else ''}")  # fmt: skip
    return labels.float()


class _Training:
    def __init__(self, source, labels, config, out, weights, validation, resume, here: Processes):
        self.source, self.labels, self.config, self.out, self.here = source, labels, config, out, here
        self.validation, self.resume, self.weights = validation, resume, weights
        if config.batch % here.world:
            raise ValueError(f"train_classifier: expected a batch that {here.world} processes can share, got "
                             f"{config.batch}")  # fmt: skip
        self.batch = min(config.batch, len(source) // here.world * here.world)
        if not self.batch:
            raise ValueError(f"train_classifier: expected an image for each of {here.world} processes, got "
                             f"{len(source)}")  # fmt: skip
        self.per_epoch = len(source) // self.batch
        self.steps = config.epochs * self.per_epoch

    def run(self, progress) -> Path:
        self.out.mkdir(parents=True, exist_ok=True)
        checkpoint, unfinished = self.out / CHECKPOINT, self.out / UNFINISHED
        if self.resume and checkpoint.is_file() and not unfinished.is_file():
            self._refuse_another_run(checkpoint)
            log.info("%s is there: nothing to train", checkpoint)
            return checkpoint
        goes_on = self.resume and unfinished.is_file()
        self.model = self._new_model(filled=goes_on).to(self.here.device, memory_format=torch.channels_last).train()
        backbone, head = self.model.trained_parameters()
        groups = [{"params": backbone, "scale": 1.0}, {"params": head, "scale": self.config.classifier_lr_scale}]
        c = self.config
        self.optimizer = torch.optim.SGD(groups, c.lr, momentum=c.momentum, weight_decay=c.weight_decay)
        first = self._restore(unfinished) if goes_on else 0
        if self.here.rank == 0 and not self.resume:  # or another run's would be taken for this one's
            checkpoint.unlink(missing_ok=True)
            unfinished.unlink(missing_ok=True)
        journal = Journal(self.out / "metrics.jsonl" if self.here.rank == 0 else None, first)
        self._run(first, journal, progress or (lambda done, total, text: None), unfinished)
        if self.here.rank == 0:
            models.save_checkpoint(checkpoint, _state(self.model), self._metadata())
            unfinished.unlink(missing_ok=True)
        if self.here.world > 1:
            distributed.barrier()
        return checkpoint

    def _new_model(self, filled: bool) -> models.CamClassifier:
        """filled: whether an unfinished training's weights will replace these."""
        c = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(c.seed)
            padding = c.tensorflow_padding
            model = models.cam_classifier(c.network, len(self.source.classes), tensorflow_padding=padding)
        model.classes, model.normalization = self.source.classes, c.normalization
        if filled:
            return model
        if self.weights is None:
            log.warning("no weights to start from: the layers up to stride 8 stay random")
        else:
            models.load_into(model, models.load_checkpoint(self.weights), classifier=False)
        return model

    def _run(self, first: int, journal: Journal, progress, unfinished: Path) -> None:
        c, here, forward, start = self.config, self.here, self.model, time.perf_counter()
        if here.world > 1:
            devices = [here.device] if here.device.type == "cuda" else None
            forward = nn.parallel.DistributedDataParallel(self.model, devices, broadcast_buffers=False)
        before = None  # a step's loss is read once the next step is on its way, so that a GPU does not wait
        for step, (images, targets) in enumerate(self._batches(first), first):
            rate = c.lr * (1 - step / self.steps) ** c.power
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            images = images.to(here.device, memory_format=torch.channels_last, non_blocking=True)
            with self._autocast():
                maps = forward(images)
            loss = F.multilabel_soft_margin_loss(maps.float().mean((2, 3)), targets.to(here.device, non_blocking=True))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            loss = loss.detach()
            if here.world > 1:
                distributed.all_reduce(loss)

            def report(step=step, rate=rate, loss=loss):
                value = loss.item() / here.world
                if not math.isfinite(value):
                    raise FloatingPointError(f"train_classifier: expected a finite loss, got {value} in step {step}; "
                                             f"lower lr ({c.lr})")  # fmt: skip
                epoch, seconds = step // self.per_epoch, round(time.perf_counter() - start, 3)
                journal.write(step=step, epoch=epoch, loss=value, lr=rate, seconds=seconds)
                progress(step + 1, self.steps, f"epoch {epoch + 1} of {c.epochs}, loss {value:.4f}")

            if before is not None:
                before()
            before = report
            if (step + 1) % self.per_epoch == 0:
                report()
                before = None
                self._end_epoch(step, journal, unfinished)

    def _end_epoch(self, step: int, journal: Journal, unfinished: Path) -> None:
        epoch = step // self.per_epoch
        if not all(torch.isfinite(p).all() for group in self.optimizer.param_groups for p in group["params"]):
            raise FloatingPointError(f"train_classifier: expected finite weights, got others after step {step}; lower "
                                     f"lr ({self.config.lr})")  # fmt: skip
        if self.here.rank == 0 and step + 1 < self.steps:
            self._save(unfinished, epoch + 1)
        if self.validation is not None:
            found = self._validate()
            journal.write(step=step, epoch=epoch, **found)
            if self.here.rank == 0:
                loss, precision = found["validation_loss"], found["validation_map"]
                log.info("epoch %d: validation loss %.4f, mAP %.4f", epoch + 1, loss, precision)

    def _autocast(self):
        bfloat16 = self.config.precision == "bfloat16"
        return torch.autocast(self.here.device.type, torch.bfloat16, enabled=bfloat16)

    def _batches(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of each batch. A crop depends on the seed, the epoch and its place in it alone."""
        c, share, augmentation = self.config, self.batch // self.here.world, self.config.augmentation()

        @functools.lru_cache(2)
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng([c.seed, epoch]).permutation(len(self.source))

        def load(step: int) -> tuple[Tensor, Tensor]:
            epoch, begin = step // self.per_epoch, step % self.per_epoch * self.batch + self.here.rank * share
            indices, images = order(epoch)[begin : begin + share], []
            for place, index in enumerate(indices.tolist(), begin + 1):  # from 1: [seed, epoch, 0] is [seed, epoch]
                image = self.source.image(self.source[index])
                images.append(augmentation(image, np.random.default_rng([c.seed, epoch, place])))
            batch = torch.stack(images), self.labels[indices]
            return tuple(t.pin_memory() for t in batch) if self.here.device.type == "cuda" else batch

        return data.prefetch(load, range(first, self.steps), workers=c.workers, ahead=max(2, c.workers))

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Photographs whole, at their size unless it exceeds the training's, with their mirrors."""
        largest, normalization = self.config.long_side[1], data.NORMALIZATIONS[self.config.normalization]

        def load(index: int) -> Tensor:
            image = self.validation.image(self.validation[index])
            return data.make_views(image, (min(1.0, largest / max(image.shape[:2])),), normalization)[0]

        mine, scores = range(self.here.rank, len(self.validation), self.here.world), []
        for views in data.prefetch(load, mine, workers=self.config.workers):
            views = views.to(self.here.device, memory_format=torch.channels_last)
            with self._autocast():
                scores.append(self.model(views).float().mean((0, 2, 3)).cpu())
        gathered = [(list(mine), scores)]
        if self.here.world > 1:
            gathered = [None] * self.here.world
            distributed.all_gather_object(gathered, (list(mine), scores))
        by_index = {i: score for indices, part in gathered for i, score in zip(indices, part, strict=True)}
        scores, labels = torch.stack([by_index[i] for i in range(len(self.validation))]), self.validation.labels()
        loss = F.multilabel_soft_margin_loss(scores, labels.float()).item()
        return {"validation_loss": loss, "validation_map": float(np.nanmean(_precision(scores, labels)))}

    def _metadata(self) -> dict[str, str]:
        return self.model.metadata() | {"training": json.dumps(configuration.plain(self.config))}

    def _save(self, path: Path, epochs: int) -> None:
        """Everything that the next epoch needs."""
        state = {f"model.{name}": value for name, value in _state(self.model).items()}
        for name, p in self.model.named_parameters():
            buffer = self.optimizer.state.get(p, {}).get("momentum_buffer")
            if buffer is not None:
                state[f"momentum.{name}"] = buffer
        models.save_checkpoint(path, state, self._metadata() | {"epochs": str(epochs)})

    def _restore(self, path: Path) -> int:
        """The step to go on with."""
        self._refuse_another_run(path)
        state = models.load_checkpoint(path)
        own = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        models.load_into(self.model, own)
        for name, p in self.model.named_parameters():
            if f"momentum.{name}" in state:
                self.optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(state[f"momentum.{name}"])
        epochs = int(models.read_metadata(path)["epochs"])
        log.info("going on after epoch %d of %d", epochs, self.config.epochs)
        return epochs * self.per_epoch

    def _refuse_another_run(self, path: Path) -> None:
        known = models.read_metadata(path)
        there = json.loads(known.get("training", "{}"))
        found = configuration.differences(self.config, there, INDIFFERENT)
        if json.loads(known.get("classes", "null")) != list(self.source.classes):
            found.append("the classes")
        if found:
            raise ValueError(f"train_classifier: expected to go on as {path} began, got another {', '.join(found)}; "
                             f"choose another folder, or start anew without resume")  # fmt: skip


def _precision(scores: Tensor, labels: Tensor) -> np.ndarray:
    return metrics.average_precision(scores.numpy(), labels.numpy())


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
