"""Segmentation networks: DeepLab-v2 (Chen et al. 2018) on a ResNet, and a light head on MobileNetV2."""

import json
import os

from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoint import kind_of, load_into
from .classifier import CamClassifier

RATES = (6, 12, 18, 24)  # of the pyramid's convolutions, in positions of stride 8
_HEADS = ("head.", "auxiliary.")  # what names of the heads' tensors begin with


class Pyramid(nn.Module):
    """DeepLab-v2's head: 3x3 convolutions of several dilations, summed."""

    name = "pyramid of DeepLab-v2"

    def __init__(self, channels: int, n_labels: int):
        super().__init__()
        for number, rate in enumerate(RATES):
            setattr(self, f"c{number}", nn.Conv2d(channels, n_labels, 3, 1, rate, rate))

    def forward(self, features: list[Tensor]) -> Tensor:
        return sum(convolution(features[-1]) for convolution in self.children())


class LightHead(nn.Module):
    """Features at stride 16, weighted by what the whole image holds, and those at stride 8 (Howard et al. 2019).

    Logits have stride 8. Group normalisation in place of the paper's batch normalisation does not depend on the batch.
    """

    name = "light head"

    def __init__(self, channels: tuple[int, ...], n_labels: int, width: int = 128):
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(channels[-1], width, 1, bias=False), nn.GroupNorm(16, width), nn.ReLU())
        self.gate = nn.Conv2d(channels[-1], width, 1, bias=False)
        self.fine = nn.Conv2d(channels[2], n_labels, 1)
        self.coarse = nn.Conv2d(width, n_labels, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        fine, last = features[2], features[-1]
        coarse = self.coarse(self.reduce(last) * self.gate(last.mean((2, 3), keepdim=True)).sigmoid())
        return F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False) + self.fine(fine)


class AuxiliaryHead(nn.Module):
    """On the last but one depth, for training alone."""

    name = "auxiliary head"

    def __init__(self, channels: int, n_labels: int, width: int = 256):
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.GroupNorm(16, width), nn.ReLU())
        self.classify = nn.Conv2d(width, n_labels, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.classify(self.reduce(features[-2]))


class Segmenter(nn.Module):
    """A backbone, whose batch normalisation uses its running statistics, and one head, or two while it trains.

    Label 0 is background, class + 1 the others.
    """

    kind = "segmenter"
    classes: tuple[str, ...] | None = None  # their names, where they are known

    def __init__(self, backbone: CamClassifier, n_classes: int, *, caffe: bool = False, auxiliary: bool = False):
        super().__init__()
        self.n_classes, self.caffe = n_classes, caffe
        self.backbone = backbone.requires_grad_(True)
        self.backbone.classifier.requires_grad_(False)  # it is not used
        channels = backbone.stage_channels
        light = backbone.name == "mobilenet_v2"
        self.head = LightHead(channels, n_classes + 1) if light else Pyramid(channels[-1], n_classes + 1)
        self.auxiliary = AuxiliaryHead(channels[-2], n_classes + 1) if auxiliary else None
        for module in [*self.head.modules(), *(self.auxiliary.modules() if auxiliary else ())]:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def name(self) -> str:
        return self.backbone.name

    @property
    def normalization(self) -> str:
        return self.backbone.normalization

    def metadata(self) -> dict[str, str]:
        """What a checkpoint must say beside its tensors for open_segmenter."""
        known = {"kind": self.kind} | self.backbone.metadata() | {"caffe": json.dumps(self.caffe)}
        return known if self.classes is None else known | {"classes": json.dumps(self.classes)}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the backbone's under torchvision's names, the heads' under head. and auxiliary."""
        own = self.state_dict()
        state = {name.removeprefix("backbone."): value for name, value in own.items() if name.startswith("backbone.")}
        state |= {name: value for name, value in own.items() if not name.startswith("backbone.")}
        state.pop("classifier.weight")
        return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}

    def fill(self, state: dict[str, Tensor], *, heads: bool = True, path: str | os.PathLike | None = None) -> None:
        """The opposite of `tensors`. heads: False to fill the backbone alone, from ImageNet's or a classifier's. path:
        the checkpoint's, to be named.

        An auxiliary head that only one of both has is left as it is, or out.
        """
        state, named = dict(state), {"path": path, "kind": kind_of(state)}
        caffe = state.pop("caffe", None) is not None
        if not heads and caffe != self.caffe:
            layers = ("torchvision's", "Caffe's")
            raise ValueError(f"Segmenter.fill: expected weights of {layers[self.caffe]} layers, got {layers[caffe]}"
                             f"{'' if path is None else f' in {path}'}; set caffe to {str(caffe).lower()}")  # fmt: skip
        own = {name: value for name, value in state.items() if name.startswith(_HEADS)}
        backbone = {name: value for name, value in state.items() if name not in own}
        load_into(self.backbone, backbone, classifier=False, **named)
        if heads:
            load_into(self.head, _within(own, "head."), **named)
            auxiliary = _within(own, "auxiliary.")
            if auxiliary and self.auxiliary is not None:
                load_into(self.auxiliary, auxiliary, **named)

    def freeze(self, depths: int, norms: bool) -> None:
        """What does not train: the backbone up to the first so many of five depths; norms: nor do batch
        normalisation's scales and shifts anywhere."""
        for modules in self.backbone.stage_modules[:depths]:
            for module in modules:
                module.requires_grad_(False)
        for module in self.backbone.modules():
            if norms and isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalised images (N, 3, H, W) -> each head's logits (N, n_classes + 1, h, w); the main one's first, at
        stride 8, and the auxiliary one's where there is one and the network trains."""
        features = self.backbone.stages(images)
        if self.training and self.auxiliary is not None:
            return self.head(features), self.auxiliary(features)
        return (self.head(features),)

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.train(False)
        return self


def _within(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
