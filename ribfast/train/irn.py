"""Training IRN's network on confident labels: which neighbouring pixels are of one class, and where objects are."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, distributed

from .. import data, models, ops
from ..processes import Processes, processes
from . import inputs, loop

log = logging.getLogger("ribfast")
CHECKPOINT = "irn.safetensors"
STRIDE = 4  # of the network's outputs


@dataclass(frozen=True)
class IrnConfig:
    """The defaults are what IRN's and RIB's released codes train with."""

    # the frozen backbone
    network: Literal["resnet10", "resnet18", "resnet50", "resnet101", "mobilenet_v2"] = "resnet50"
    epochs: int = 3  # passes over the images
    batch: int = 32  # images a step, of all processes together; the last ones that fill no batch are left out
    lr: float = 0.1  # learning rate of the boundary branch at the start
    displacement_lr_scale: float = 10.0  # the displacement branch's learning rate is so many times that
    weight_decay: float = 1e-4  # of SGD, of all that trains
    momentum: float = 1e-4  # the released code passes its weight decay here
    power: float = 0.9  # learning rate = lr * (1 - step / steps) ** power
    rescale: tuple[float, float] = (0.5, 1.5)  # photographs are rescaled by a factor between these
    crop: int = 512  # side of the crops, a multiple of 4
    flip: bool = True  # mirror every second photograph
    radius: int = 10  # pairs are of pixels, a quarter of the crop's, that are closer than this
    normalization: Literal["imagenet", "symmetric"] = "imagenet"  # of pixels; symmetric: x / 127.5 - 1
    tensorflow_padding: bool = False  # for MobileNetV2 weights that were trained in TensorFlow
    # bfloat16: under autocast, the frozen backbone too; weights, affinities, losses and updates stay float32
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0  # of the branches' weights, the order of the images and their crops
    workers: int = 4  # threads that decode; results do not depend on them
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def __post_init__(self):
        loop.check(self)
        if not 0 <= self.displacement_lr_scale < math.inf:
            raise ValueError(f"IrnConfig: expected displacement_lr_scale of at least 0, got "
                             f"{self.displacement_lr_scale}")  # fmt: skip
        ops.pair_offsets(self.radius)
        least = STRIDE * (2 * self.radius - 1)
        if self.crop % STRIDE or self.crop < least:
            raise ValueError(f"IrnConfig: expected crop to be a multiple of {STRIDE} of at least {least}, where pairs "
                             f"closer than {self.radius} fit, got {self.crop}")  # fmt: skip
        self.augmentation()

    def augmentation(self) -> data.Augmentation:
        return loop.augmentation(self)

    @classmethod
    def released(cls) -> "IrnConfig":
        return cls()

    @classmethod
    def small(cls) -> "IrnConfig":
        """For some hundreds of photographs of about 320 pixels: smaller batches and crops, more passes."""
        return cls(epochs=10, batch=8, crop=224)


def train_irn(
    source: data.Source,
    labels: inputs.Labels,
    config: IrnConfig,
    out: str | Path,
    *,
    weights: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: loop.Progress | None = None,
    scanned: loop.Progress | None = None,
    begun: loop.Begun | None = None,
) -> Path:
    """Trains IRN's network on a source's images and returns the checkpoint, which models.open_irn opens.

    labels: each image's (H, W) uint8 by its name: 0 background, class + 1, 255 unknown (masks.confident_labels makes
    them), from a function, a mapping, or a folder of NAME.png. weights: the backbone's, of ImageNet or of a classifier.
    resume: goes on after the last whole epoch in `out`, if there is one; overwrite: replaces what is there; without
    either, a training there is an error. Under torchrun the processes share each batch.
    Every image and its labels are looked at first, which `scanned` reports.
    begun: called with digests of the inputs once nothing is wrong, before anything is written. Writes irn.safetensors
    and metrics.jsonl.
    """
    if not len(source):
        raise ValueError("train_irn: expected images, got none")
    reader = inputs.reader("train_irn", source, labels)
    task = _Irn(source, reader, config, weights, inputs.digests(source, weights, labels=labels), scanned)
    with processes(config.device) as here:
        return loop.train(task, Path(out), here, resume=resume, overwrite=overwrite, progress=progress, begun=begun)


class _Irn:
    """The task of `loop`."""

    parts, files, indifferent, idle = 1, (), (), False
    name, checkpoint = "train_irn", CHECKPOINT

    def __init__(self, source, labels, config, weights, inputs, scanned):
        self.source, self.labels, self.config, self.weights, self.inputs = source, labels, config, weights, inputs
        self.images, self.augmentation, self.scanned = len(source), config.augmentation(), scanned

    def inspect(self, here: Processes) -> None:
        inputs.look(self.name, self.source, self.labels, self.config.workers, here, self.scanned)

    def begin(self, filled: bool) -> None:
        c = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(c.seed)
            self.model = models.irn_network(c.network, tensorflow_padding=c.tensorflow_padding)
        self.model.backbone.normalization, self.model.crop = c.normalization, c.crop
        if filled:
            return
        if self.weights is None:
            log.warning("no weights to start from: the backbone stays random")
            return
        inputs.check_weights(self.name, self.weights, self.model.metadata())
        self.model.fill(models.load_checkpoint(self.weights), branches=False, path=self.weights)

    def schedule(self, per_epoch: int) -> loop.Schedule:
        return loop.Schedule(self.config.epochs * per_epoch, per_epoch)

    def groups(self) -> list[dict]:
        named = list(self.model.branches.named_parameters())
        boundary = [p for name, p in named if name.startswith("fc_edge")]
        displacement = [p for name, p in named if name.startswith("fc_dp")]
        scale = self.config.displacement_lr_scale
        return [{"params": boundary, "scale": 1.0}, {"params": displacement, "scale": scale}]

    def load(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A crop, and its labels at a quarter of its size: those of pixels 2, 6, 10, ..., as Pillow's nearest are."""
        item = self.source[index]
        try:
            image, labels = self.augmentation.with_labels(self.source.image(item), self.labels(item.name), rng)
        except ValueError as error:
            raise ValueError(f"train_irn: {item.name}: {error}") from error
        return image, labels[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE].contiguous()

    def prepared(self, here: Processes, images: int) -> torch.nn.Module:
        return self.model

    def begin_step(self, step: int, batch: list[Tensor], here: Processes) -> None:
        pass

    def losses(self, forward, batch, here: Processes) -> dict[str, Tensor]:
        images, labels = batch
        with loop.autocast(self.config, here):
            boundary, displacement = forward(images)
        boundary, displacement = boundary[:, 0].float().sigmoid(), displacement.float()
        sums = ops.pair_losses(boundary.contiguous(), displacement.contiguous(), labels, self.config.radius)
        counts = sums[5:].detach().clone()
        if here.world > 1:  # means are over the pairs of the whole batch
            distributed.all_reduce(counts)
        return irn_losses(sums[:5] * here.world, counts)

    def pause(self, steps: int, here: Processes) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def finish(self, here: Processes) -> None:
        """The mean displacement: over all training images, each cut at the right and below to the crop, or padded."""
        c, share = self.config, max(1, self.config.batch // here.world)
        normalization = data.NORMALIZATIONS[c.normalization]

        def load(begin: int) -> tuple[Tensor, ...]:
            images = torch.zeros(min(share, self.images - begin), 3, c.crop, c.crop)
            for image, item in zip(images, self.source[begin : begin + share], strict=True):
                pixels = np.ascontiguousarray(self.source.image(item)[: c.crop, : c.crop])
                image[:, : pixels.shape[0], : pixels.shape[1]] = data.make_views(pixels, (1.0,), normalization)[0][0]
            return loop.pinned((images,), here)

        self.model.eval()
        self.model.branches.mean_shift.running_mean.zero_()
        total = torch.zeros(2, dtype=torch.float64, device=here.device)
        mine = range(here.rank * share, self.images, here.world * share)
        for batch in data.prefetch(load, mine, workers=c.workers, ahead=max(2, c.workers)):
            (images,) = loop.to_device(batch, here)
            with loop.autocast(c, here):
                displacement = self.model.branches.displacement(self.model.features(images))
            total += displacement.double().mean((2, 3)).sum(0)
        if here.world > 1:
            distributed.all_reduce(total)
        self.model.branches.mean_shift.running_mean.copy_(total / self.images)

    def tensors(self) -> dict[str, Tensor]:
        return self.model.tensors()

    def fill(self, state: dict[str, Tensor]) -> None:
        self.model.fill(state)

    def result(self) -> dict[str, Tensor]:
        return self.tensors()

    def metadata(self) -> dict[str, str]:
        return self.model.metadata()

    def others(self, known: dict[str, str]) -> list[str]:
        return []


def irn_losses(sums: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """IRN's loss and its parts, from the five sums and the three counts of `ops.pair_losses`."""
    background, foreground, other = counts.unbind()
    positive = (sums[0] / (background + 1e-5) + sums[1] / (foreground + 1e-5)) / 2
    negative = sums[2] / (other + 1e-5)
    displacement = sums[3] / (2 * foreground + 1e-5) + sums[4] / (2 * background + 1e-5)
    loss = (positive + negative) / 2 + displacement / 2
    return {"loss": loss, "positive": positive, "negative": negative, "displacement": displacement}
