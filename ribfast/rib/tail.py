"""A classifier's trained part with its batch normalisation folded into the convolutions, on a canvas.

A layer computes conv(x, w') + b' with w' = w * gamma / sigma and b' = beta - mean * gamma / sigma; sigma and mean never
change. Gradients reach w, gamma and beta through w' and b', so what trains is what trained before (exact).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models import CamClassifier
from ..models.mobilenet import SamePadded


class _Layer(NamedTuple):
    stride: int
    padding: int | None  # None: TensorFlow's
    groups: int
    activation: str
    weight: Tensor  # theta_0's, float32, channels last, as are the others
    gamma: Tensor
    beta: Tensor
    inverse: Tensor  # 1 / sigma
    mean: Tensor


class Tail:
    """What the adapted images share: the structure, theta_0 and the statistics."""

    def __init__(self, model: CamClassifier, dtype: torch.dtype):
        self.dtype = dtype
        self.blocks, self.layers = [], []
        for layers, adds, projection, activation in model.tail_blocks():
            numbers = [self._append(layer) for layer in layers]
            self.blocks.append((numbers, adds, None if projection is None else self._append(projection), activation))
        self.classifier = _float(model.classifier.weight)
        self.tensorflow_padding = any(layer.padding is None for layer in self.layers)

    def _append(self, layer) -> int:
        convolution, norm, activation = layer
        shifted = isinstance(convolution, SamePadded) and convolution.stride[0] == 2
        self.layers.append(
            _Layer(
                convolution.stride[0],
                None if shifted else convolution.padding[0],
                convolution.groups,
                activation,
                _float(convolution.weight),
                _float(norm.weight),
                _float(norm.bias),
                1 / (_float(norm.running_var) + norm.eps).sqrt(),
                _float(norm.running_mean),
            )
        )
        return len(self.layers) - 1

    def __call__(self, x: Tensor, masks: tuple[Tensor, Tensor], weights: "Weights") -> Tensor:
        """A canvas of the trunk's features -> logits maps (C, cells); values in the gutter mean nothing."""
        for numbers, adds, projection, activation in self.blocks:
            y = x
            for number in numbers:
                y = self._layer(y, number, masks, weights)
            if projection is not None:
                x = self._layer(x, projection, masks, weights)
            if adds:
                y = y.add_(x)
            x = y.relu_() if activation == "relu" else y
        return F.conv2d(x, weights.folded[-1])[0].flatten(1)

    def _layer(self, x: Tensor, number: int, masks: tuple[Tensor, Tensor], weights: "Weights") -> Tensor:
        layer, weight = self.layers[number], weights.folded[number]
        padding = layer.padding
        if weight.shape[2] == 3:
            x = x * masks[x.shape[2] != masks[0].shape[2]]
        if padding is None:
            x, padding = F.pad(x, (0, 1, 0, 1)), 0
        y = F.conv2d(x, weight, weights.biases[number], layer.stride, padding, 1, layer.groups)
        if layer.activation == "relu":
            return y.relu_()
        return F.hardtanh_(y, 0.0, 6.0) if layer.activation == "relu6" else y


class Weights:
    """One adapted image's weights: float32 masters, and what the convolutions take, folded and in the tail's dtype."""

    def __init__(self, tail: Tail):
        self.tail = tail
        self.masters = [layer.weight.clone() for layer in tail.layers] + [tail.classifier.clone()]
        self.gammas = [layer.gamma.clone() for layer in tail.layers]
        self.betas = [layer.beta.clone() for layer in tail.layers]
        everything = [*self.masters, *self.gammas, *self.betas]
        self.velocities = [torch.zeros_like(t) for t in everything]
        self.folded = [torch.empty_like(w, dtype=tail.dtype) for w in self.masters]
        self.biases = [torch.empty_like(b, dtype=tail.dtype) for b in self.betas]
        self._fold()
        for leaf in self.leaves:
            leaf.requires_grad_()

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.folded, *self.biases]

    @torch.no_grad()
    def reset(self) -> None:
        """Back to theta_0."""
        layers = self.tail.layers
        start = [layer.weight for layer in layers] + [self.tail.classifier]
        start += [layer.gamma for layer in layers] + [layer.beta for layer in layers]
        torch._foreach_copy_([*self.masters, *self.gammas, *self.betas], start)
        torch._foreach_zero_(self.velocities)
        self._fold()

    @torch.no_grad()
    def _fold(self) -> None:
        for i, layer in enumerate(self.tail.layers):
            scale = self.gammas[i] * layer.inverse
            torch.mul(self.masters[i], scale[:, None, None, None], out=self.folded[i])
            self.biases[i].copy_(self.betas[i] - layer.mean * scale)
        self.folded[-1].copy_(self.masters[-1])

    def gradients(self, loss: Tensor, *, scale: float = 1.0) -> list[Tensor]:
        """Of the leaves; scale: what 16-bit gradients are multiplied by on their way."""
        return list(torch.autograd.grad(loss * scale, self.leaves))

    @torch.no_grad()
    def update(self, gradients: list[Tensor], rate: Tensor, config, *, scale: float = 1.0) -> None:
        """A step of SGD on the masters, by the leaves' gradients; rate: of the backbone, () float32."""
        count = len(self.tail.layers)
        for i, master in enumerate(self.masters):
            gradient = gradients[i].float() / scale
            if i == count:
                self._move(i, master, gradient, rate * config.classifier_lr_scale, config)
                continue
            layer, gamma, beta = self.tail.layers[i], self.gammas[i], self.betas[i]
            bias = gradients[count + 1 + i].float() / scale
            for_gamma = layer.inverse * ((gradient * master).sum((1, 2, 3)) - layer.mean * bias)
            gradient = gradient * (gamma * layer.inverse)[:, None, None, None]
            self._move(i, master, gradient, rate, config)
            self._move(count + 1 + i, gamma, for_gamma, rate, config)
            self._move(2 * count + 1 + i, beta, bias, rate, config)
        self._fold()

    def _move(self, number: int, parameter: Tensor, gradient: Tensor, rate: Tensor, config) -> None:
        velocity = self.velocities[number].mul_(config.momentum).add_(gradient).add_(parameter, alpha=config.weight_decay)
        parameter.addcmul_(velocity, -rate)


def _float(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().float()
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
