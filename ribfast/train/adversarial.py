"""End-to-end adversarial erasing (Stammes et al. 2021) as a way to train the classifier.

In turns of some steps, a localiser G learns to classify while erasing what its maps attend to hides the class from an
adversary F, and F learns to classify what is left. metrics.jsonl has of either turn the loss and the pairs of an image
and one of its classes; of the localiser's, the loss of its classification, the adversary's mean probability of what was
erased (left) and the mean attention (attended).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from .. import data, models, ops
from ..processes import Processes, processes
from . import inputs, loop
from .classifier import ClassifierConfig, ClassifierTask


@dataclass(frozen=True)
class EaderConfig(ClassifierConfig):
    """The constants are EADER's, as its code was released; photographs are rescaled, and layers frozen, as for any
    classifier here."""

    epochs: int = 10  # passes over the images, of both networks together
    lr: float = 0.01  # learning rate of the localiser's backbone at the start
    classifier_lr_scale: float = 1.0  # classifiers' learning rates are so many times their backbones'
    momentum: float = 0.9  # of either network's own steps
    power: float = 0.0  # learning rate = lr * (1 - step / steps) ** power
    crop: int = 448  # side of the crops
    method: Literal["eader"] = "eader"
    # the adversary's backbone
    adversary: Literal["resnet10", "resnet18", "resnet50", "resnet101", "mobilenet_v2"] = "resnet18"
    adversary_lr_scale: float = 1.0  # the adversary's learning rates are so many times the localiser's
    # cam: of the logits map; gradcam: of the features weighted by the class's gradient, which is held constant, so that
    # the classifier's weights do not learn where to attend
    attention: Literal["cam", "gradcam"] = "cam"
    localiser_steps: int = 200  # steps of the localiser, before a turn of the adversary
    adversary_steps: int = 200  # steps of the adversary, before the localiser's next turn
    erasing: float = 0.05  # weight of the adversary's probability of the class that was erased
    regularisation: float = 1e-5  # weight of the attention's size
    regulariser: Literal["mean", "sum"] = "mean"  # the attention's size: its mean over the pixels, or its sum
    sharpness: float = 100.0  # erased is sigmoid(sharpness * (attention - level))
    level: float = 0.5  # of attention, which is from 0 to 1: half is erased there
    adversary_normalization: Literal["imagenet", "symmetric"] = "imagenet"  # of the adversary's pixels
    adversary_tensorflow_padding: bool = False  # for an adversary of MobileNetV2 weights trained in TensorFlow

    def __post_init__(self):
        super().__post_init__()
        if not self.frozen_trunk:
            raise ValueError("EaderConfig: expected frozen_trunk, got false; train whole with method bce")
        for name in ("localiser_steps", "adversary_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"EaderConfig: expected {name} of at least 1, got {getattr(self, name)}")
        for name in ("adversary_lr_scale", "erasing", "regularisation", "sharpness"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"EaderConfig: expected {name} of at least 0, got {getattr(self, name)}")
        if not abs(self.level) <= 1e6 or not self.sharpness <= 1e6:
            raise ValueError(f"EaderConfig: expected level and sharpness of at most a million, got {self.level} and "
                             f"{self.sharpness}")  # fmt: skip
        if self.adversary_tensorflow_padding and self.adversary != "mobilenet_v2":
            raise ValueError(f"EaderConfig: expected adversary_tensorflow_padding with an adversary of mobilenet_v2, "
                             f"got {self.adversary}")  # fmt: skip

    @classmethod
    def released(cls) -> "EaderConfig":
        return cls()

    @classmethod
    def paper(cls) -> "EaderConfig":
        """Attention's size is its sum, as this project reads the paper."""
        return cls(regulariser="sum")


def train_eader(
    source: data.Source,
    config: EaderConfig,
    out: str | Path,
    *,
    weights: str | Path | None = None,
    adversary_weights: str | Path | None = None,
    validation: data.Source | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: loop.Progress | None = None,
    scanned: loop.Progress | None = None,
    begun: loop.Begun | None = None,
) -> Path:
    """As train_classifier, with adversarial erasing; the checkpoint is the localiser's, as any classifier's is.

    adversary_weights: the backbone that the adversary starts from.
    """
    task = EaderTask(source, config, weights, adversary_weights, validation, scanned)
    with processes(config.device) as here:
        return loop.train(task, Path(out), here, resume=resume, overwrite=overwrite, progress=progress, begun=begun)


class _Tail(nn.Module):
    """What follows a network's trunk."""

    def __init__(self, network: models.CamClassifier):
        super().__init__()
        self.network = network

    def forward(self, trunk: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits maps."""
        features = self.network.tail(trunk)
        return features, self.network.classifier(features)


class _Both(nn.Module):
    """The localiser and the adversary.

    All layers run in copies whose batch normalisation is folded into the convolutions, on what the trained weights
    are there now. Weights that rest, and trunks, which never train, are the copies' own.
    """

    def __init__(self, localiser: models.CamClassifier, adversary: models.CamClassifier, attention: str):
        super().__init__()
        self.localiser, self.adversary, self.attention = localiser, adversary, attention

    def fold(self) -> None:
        """Takes the weights as they are for those that rest."""
        self.resting = {name: models.folded(network) for name, network in self.named_children()}

    def forward(self, trains: str, trunk: Tensor) -> tuple[Tensor, ...]:
        """The localiser's logits maps (N, C, h, w) and its attention before ReLU; or the adversary's logits maps.

        Logits are means over positions, so a class's gradient with respect to the features is its row of the
        classifier divided by their number, everywhere: Grad-CAM takes no backward pass.
        """
        weights = models.trained_folded(getattr(self, trains))
        own = {f"network.{name}": weight for name, weight in weights.items()}
        features, maps = torch.func.functional_call(_Tail(self.resting[trains]), own, (trunk,))
        if trains == "adversary":
            return (maps,)
        if self.attention == "cam":
            return maps, maps
        return maps, F.conv2d(features, weights["classifier.weight"].detach() / features[0, 0].numel())


class EaderTask(ClassifierTask):
    """The task of `loop`.

    Neither network's turn takes more of the other than it needs: in the localiser's turn the adversary has gradients of
    its images and none of its weights, in the adversary's turn the localiser has none.
    """

    name, idle, method = "train_eader", True, "eader"

    def __init__(self, source, config, weights, adversary_weights, validation, scanned=None):
        super().__init__(source, config, weights, validation, scanned)
        self.adversary_weights = adversary_weights
        self.inputs |= inputs.of_weights(adversary_weights, "adversary_weights")
        self.trains = None  # until the first step
        self.renormalization = _between(config.normalization, config.adversary_normalization)

    def begin(self, filled: bool) -> None:
        super().begin(filled)
        c = self.config
        adversary = self.network(c.adversary, c.adversary_normalization, c.adversary_tensorflow_padding, c.seed + 1)
        if not filled:
            self.start(adversary, self.adversary_weights, "adversary")
        self.model = _Both(self.classifier, adversary, c.attention)

    def schedule(self, per_epoch: int) -> loop.Schedule:
        found, turn = super().schedule(per_epoch), self.config.localiser_steps
        if found.steps <= turn:
            raise ValueError(f"{self.name}: expected more steps than the localiser's first turn of {turn}, got "
                             f"{found.steps}, in which the adversary would learn nothing; lower localiser_steps and "
                             f"adversary_steps, or raise epochs")  # fmt: skip
        return found

    def groups(self) -> list[dict]:
        groups = []
        for network, scale in ((self.model.localiser, 1.0), (self.model.adversary, self.config.adversary_lr_scale)):
            backbone, head = network.trained_parameters()
            groups += [{"params": backbone, "scale": scale}]
            groups += [{"params": head, "scale": scale * self.config.classifier_lr_scale}]
        return groups

    def begin_step(self, step: int, batch: list[Tensor], here: Processes) -> None:
        c = self.config
        trains = "localiser" if step % (c.localiser_steps + c.adversary_steps) < c.localiser_steps else "adversary"
        if trains != self.trains:
            self.trains = trains
            self.model.fold()
            if self.renormalization is not None:
                self.renormalization = [factor.to(here.device) for factor in self.renormalization]
        self.image, self.present = batch[1].nonzero(as_tuple=True)  # of each pair of an image and a class of it
        self.pairs = batch[1].count_nonzero().float()
        if here.world > 1:  # means are over the pairs of the whole batch
            distributed.all_reduce(self.pairs)

    def losses(self, forward, batch, here: Processes) -> dict[str, Tensor]:
        (images, targets), share = batch, here.world / self.pairs.clamp(min=1)
        localiser, adversary = self.model.resting["localiser"], self.model.resting["adversary"]
        with loop.autocast(self.config, here):
            if self.trains == "localiser":
                maps, attention = forward("localiser", localiser.trunk(images))
                erased, areas = self._erase(images, attention)
                found = adversary.through(erased).float().mean((2, 3))
            else:
                with torch.no_grad():
                    erased, _ = self._erase(images, localiser(images))
                    trunk = adversary.trunk(erased)
                (maps,) = forward("adversary", trunk)
        logits = maps.float().mean((2, 3))
        if self.trains == "adversary":
            losses = F.multilabel_soft_margin_loss(logits, targets[self.image], reduction="none")
            return {"loss": losses.sum() * share, "pairs": self.pairs}
        classification = F.multilabel_soft_margin_loss(logits, targets)
        left = found[torch.arange(len(found), device=found.device), self.present].sigmoid().sum() * share
        attended = areas.sum() * share
        mean = attended / images[0, 0].numel()
        size = mean if self.config.regulariser == "mean" else attended
        loss = classification + self.config.erasing * left + self.config.regularisation * size
        return {"loss": loss, "pairs": self.pairs, "classification": classification, "left": left, "attended": mean}

    def _erase(self, images: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Of every pair, what the adversary is shown, and the attention summed."""
        if self.renormalization is not None:
            scale, shift = self.renormalization
            images = images * scale + shift
        if torch.is_autocast_enabled(images.device.type):
            images = images.to(torch.get_autocast_dtype(images.device.type))
        c = self.config
        return ops.erase(images, attention[self.image, self.present], self.image, sharpness=c.sharpness, level=c.level)

    def tensors(self) -> dict[str, Tensor]:
        return {n: value for n, value in self.model.state_dict().items() if not n.endswith("num_batches_tracked")}

    def fill(self, state: dict[str, Tensor]) -> None:
        for name, network in self.model.named_children():
            own = {n.removeprefix(f"{name}."): value for n, value in state.items() if n.startswith(f"{name}.")}
            models.load_into(network, own)

    def result(self) -> dict[str, Tensor]:
        return super().tensors()


def _between(first: str, second: str) -> tuple[Tensor, Tensor] | None:
    """What pixels of one normalisation are multiplied by, and what is added, to have the other; None: nothing."""
    if first == second:
        return None
    (mean, std), (other_mean, other_std) = (
        (torch.tensor(n.mean), torch.tensor(n.std)) for n in (data.NORMALIZATIONS[first], data.NORMALIZATIONS[second])
    )
    return (std / other_std).view(3, 1, 1), ((mean - other_mean) / other_std).view(3, 1, 1)
