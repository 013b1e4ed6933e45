"""The classifier whose class activation maps everything starts from."""

import json
import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Layer(NamedTuple):
    """A convolution without bias, its batch normalisation and what follows: "relu", "relu6" or ""."""

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d
    activation: str


class Block(NamedTuple):
    """Layers in a row, the block's input or its projection added to their output, then an activation."""

    layers: list[Layer]
    adds: bool
    projection: Layer | None
    activation: str


class CamClassifier(nn.Module, ABC):
    """A backbone in two parts and a 1x1 convolution without bias, whose output is the logits map = CAM before ReLU.

    The trunk (everything up to stride 8) never trains and its features are detached; the rest and the classifier do.
    Only `whole` trains it too, for weights that start at random. Batch normalisation always uses its running
    statistics; its affine parameters train with the rest.
    """

    kind = "classifier"
    classifier: nn.Conv2d
    classes: tuple[str, ...] | None = None  # their names, where they are known
    normalization: str = "imagenet"  # of its input; or "symmetric": pixel / 127.5 - 1
    tensorflow_padding: bool = False

    def __init__(self, name: str, n_classes: int):
        super().__init__()
        self.name, self.n_classes = name, n_classes

    def metadata(self) -> dict[str, str]:
        """What a checkpoint must say beside its tensors for open_classifier."""
        known = {"network": self.name, "normalization": self.normalization}
        known["tensorflow_padding"] = json.dumps(self.tensorflow_padding)
        return known if self.classes is None else known | {"classes": json.dumps(self.classes)}

    @property
    @abstractmethod
    def trunk_modules(self) -> list[nn.Module]:
        """What never trains."""

    @abstractmethod
    def _trunk(self, images: Tensor) -> Tensor: ...

    @abstractmethod
    def tail(self, trunk: Tensor) -> Tensor:
        """The trunk's output -> the features that are classified, at stride 16."""

    @property
    @abstractmethod
    def stage_channels(self) -> tuple[int, ...]:
        """Of `stages`."""

    @abstractmethod
    def stages(self, images: Tensor) -> list[Tensor]:
        """The features of five depths, at strides 4, 4, 8, 16 and 16; the last ones are what is classified."""

    @property
    @abstractmethod
    def stage_modules(self) -> list[list[nn.Module]]:
        """What `stages` runs for each depth."""

    @abstractmethod
    def tail_blocks(self) -> list[Block]:
        """What the tail computes, block by block, for those who compute it in another way."""

    def trunk(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) -> what never changes while the rest trains, at stride 8; detached."""
        return self._trunk(images).detach()

    def maps(self, trunk: Tensor) -> Tensor:
        """The trunk's output -> logits maps (N, C, h, w)."""
        return self.classifier(self.tail(trunk))

    def forward(self, images: Tensor) -> Tensor:
        """Logits maps (N, C, h, w) at stride 16; pool them over their positions for logits."""
        return self.maps(self.trunk(images))

    def through(self, images: Tensor) -> Tensor:
        """As forward, but not detached: for gradients of the images."""
        return self.maps(self._trunk(images))

    def trained_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(the backbone's, the classifier's), which train at rates of their own."""
        backbone = [p for p in self.parameters() if p.requires_grad and p is not self.classifier.weight]
        return backbone, [self.classifier.weight]

    def reset(self) -> None:
        """Random weights for whatever no checkpoint fills, and the trunk frozen."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.out_channels * module.kernel_size[0] * module.kernel_size[1] // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan))
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        for module in self.trunk_modules:
            module.requires_grad_(False)

    def whole(self) -> None:
        """Lets the trunk train with the rest; `through` has its gradients."""
        self.requires_grad_(True)

    @torch.no_grad()
    def measure(self, images: Tensor) -> None:
        """Batch normalisation's statistics of these images, layer by layer, as random weights need them."""

        def note(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
            variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)

        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        hooks = [norm.register_forward_pre_hook(note) for norm in norms]
        try:
            self.through(images)
        finally:
            for hook in hooks:
                hook.remove()

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self
