"""A classifier's trained part with its batch normalisation folded into the convolutions, on a canvas.

A layer computes conv(x, w') + b' with w' = w * gamma / sigma and b' = beta - mean * gamma / sigma; sigma and mean never
change. Gradients reach w, gamma and beta through w' and b', so what trains is what trained before (exact).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models import CamClassifier
from ..models.mobilenet import SamePadded
from ..ops.adapt import activate_, activate_backward, update_folded_

LIMITS = {"relu": math.inf, "relu6": 6.0}


class _Layer(NamedTuple):
    stride: int
    padding: int | None  # None: TensorFlow's
    groups: int
    norm: Tensor  # (2, O): 1 / sigma and the mean, which never change
    spatial: bool  # whether it looks beyond its cell, so that its input's gutter has to be zero


class Tail:
    """What the adapted images share: the structure, theta_0 and the statistics."""

    def __init__(self, model: CamClassifier, dtype: torch.dtype):
        self.dtype = dtype
        self.blocks, self.layers, self.start = [], [], []  # start: theta_0, weight and affine (2, O) of each layer
        for layers, adds, projection, activation in model.tail_blocks():
            numbers = [(self._append(layer), layer.activation) for layer in layers]
            self.blocks.append((numbers, adds, None if projection is None else self._append(projection), activation))
        self.classifier = _float(model.classifier.weight)
        self.tensorflow_padding = any(layer.padding is None for layer in self.layers)
        self.leaves = empty_leaves(self)
        for number, (weight, (gamma, beta)) in enumerate(self.start):
            inverse, mean = self.layers[number].norm
            scale = gamma * inverse
            self.leaves[2 * number].copy_(weight * scale[:, None, None, None])
            self.leaves[2 * number + 1].copy_(beta - mean * scale)
        self.leaves[-1].copy_(self.classifier)
        for leaf in self.leaves:
            leaf.requires_grad_()

    def _append(self, layer) -> int:
        convolution, norm, _ = layer
        padding = convolution.padding[0]
        if isinstance(convolution, SamePadded) and convolution.stride[0] == 2:
            padding = None
        statistics = torch.stack([1 / (_float(norm.running_var) + norm.eps).sqrt(), _float(norm.running_mean)])
        spatial = convolution.kernel_size[0] > 1
        self.layers.append(_Layer(convolution.stride[0], padding, convolution.groups, statistics, spatial))
        self.start.append((_float(convolution.weight), torch.stack([_float(norm.weight), _float(norm.bias)])))
        return len(self.layers) - 1

    def __call__(self, x: Tensor, masks: tuple[Tensor, Tensor], weights: "Weights") -> Tensor:
        """A canvas of the trunk's features -> logits maps (C, cells); values in the gutter mean nothing."""
        leaves = weights.leaves

        def convolve(x, number, activation="", shortcut=None, before=None):
            mask = None
            if before is not None and self.layers[before].spatial:
                mask = masks
            return _Convolve.apply(
                x, leaves[2 * number], leaves[2 * number + 1], shortcut, self.layers[number], activation, mask
            )

        for block, (numbers, adds, projection, activation) in enumerate(self.blocks):
            following = self.blocks[block + 1][0][0][0] if block + 1 < len(self.blocks) else None
            shortcut = None
            if adds:
                shortcut = x if projection is None else convolve(x, projection)
            for place, (number, own) in enumerate(numbers):
                if place + 1 < len(numbers):
                    x = convolve(x, number, own, before=numbers[place + 1][0])
                else:
                    x = convolve(x, number, activation or own, shortcut, following)
        return _Classify.apply(x, leaves[-1])[0].flatten(1)

    def activation_bytes(self, rows: int, columns: int) -> int:
        """About what a step keeps of a canvas for its backward pass, and the three largest tensors of that pass."""
        strided, sizes = False, []
        for numbers, _, projection, _ in self.blocks:
            here = [number for number, _ in numbers] + ([] if projection is None else [projection])
            for number in here:
                strided = strided or self.layers[number].stride == 2
                cells = rows * columns * (1 if strided else 4)
                sizes.append(cells * len(self.start[number][0]) * self.dtype.itemsize)
        return sum(sizes) + 3 * max(sizes)

    def weight_bytes(self) -> int:
        """Of an adapted image's weights: masters, velocities, folded ones and their gradients."""
        n = sum(weight.numel() + affine.numel() for weight, affine in self.start) + self.classifier.numel()
        return n * (8 + 3 * self.dtype.itemsize)


class _Convolve(torch.autograd.Function):
    """Convolution, bias, shortcut, activation and the zeros of the gutter (a masked value has no gradient)."""

    @staticmethod
    def forward(ctx, x, weight, bias, shortcut, layer, activation, masks):
        padding = layer.padding
        if padding is None:
            padding, x = 0, F.pad(x, (0, 1, 0, 1))
        y = F.conv2d(x, weight, bias, layer.stride, padding, 1, layer.groups)
        y = y.contiguous(memory_format=torch.channels_last)  # some of CUDA's convolutions answer in another layout
        if activation:
            mask = None if masks is None else masks[y.shape[2] != masks[0].shape[2]]
            activate_(y, shortcut, mask, LIMITS[activation])
        elif shortcut is not None:
            y.add_(shortcut)
        ctx.layer, ctx.activation = layer, activation
        ctx.save_for_backward(x, weight, y if activation else None)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, weight, y = ctx.saved_tensors
        layer, wanted = ctx.layer, ctx.needs_input_grad[0]
        if ctx.activation:
            gradient, for_bias = activate_backward(gradient, y, LIMITS[ctx.activation])
        else:
            for_bias = gradient.sum((0, 2, 3))
        for_shortcut = gradient if ctx.needs_input_grad[3] else None
        if weight.shape[2] == 1 and layer.stride == 1 and weight.dtype != torch.float32:
            rows, columns, for_x = _matrix(gradient), _matrix(x), None
            if wanted:
                for_x = (rows @ weight[:, :, 0, 0]).view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)
            for_weight = (rows.T @ columns)[:, :, None, None]
        else:
            padding = 0 if layer.padding is None else layer.padding
            for_x, for_weight, _ = torch.ops.aten.convolution_backward(
                gradient, x, weight, [0], [layer.stride] * 2, [padding] * 2, [1, 1], False, [0, 0], layer.groups,
                [wanted, True, False],
            )  # fmt: skip
            if wanted and layer.padding is None:
                for_x = for_x[:, :, :-1, :-1]
        return for_x, for_weight, for_bias, for_shortcut, None, None, None


class _Classify(torch.autograd.Function):
    """The 1x1 convolution to class maps, by float32 weights in x's type; their gradient is float32.

    It sums over all cells of all rows that are pooled, so that in float16 it is held down to its range.
    """

    @staticmethod
    def forward(ctx, x, weight):
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        rows, down = _matrix(gradient), 2.0**-6 if x.dtype == torch.float16 else 1.0
        for_x = (rows @ weight[:, :, 0, 0]).view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)
        for_weight = ((rows * down).T @ _matrix(x)).float() / down
        return for_x, for_weight[:, :, None, None]


def _matrix(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class Weights:
    """One adapted image's weights: float32 masters, and what the convolutions take, folded and in the tail's dtype.

    At theta_0 they are the tail's own; the first update writes the image's.
    """

    def __init__(self, tail: Tail):
        self.tail = tail
        self._leaves = empty_leaves(tail)
        for leaf in self._leaves:
            leaf.requires_grad_()
        self._layers = [  # as update_folded_ writes them
            (*(torch.empty_like(t) for t in (*start, *start)), weight.detach(), bias.detach())
            for start, weight, bias in zip(tail.start, self._leaves[:-1:2], self._leaves[1::2], strict=True)
        ]
        self._classifier_velocity = torch.empty_like(tail.classifier)
        self.at_start = True  # the next gradients and update are the first

    @property
    def leaves(self) -> list[Tensor]:
        """The folded weight and bias of every layer, then the classifier's weight in float32."""
        return self.tail.leaves if self.at_start else self._leaves

    def reset(self) -> None:
        """Back to theta_0."""
        self.at_start = True

    def gradients(self, loss: Tensor, *, scale: float = 1.0) -> list[Tensor]:
        """Of the leaves; scale: what 16-bit gradients are multiplied by on their way."""
        return list(torch.autograd.grad(loss * scale, self.leaves))

    @torch.no_grad()
    def update(self, gradients: list[Tensor], anchor: list[Tensor] | None, rate: Tensor, config, *, scale=1.0) -> None:
        """A step of SGD on the masters, by the leaves' gradients and the anchor's; rate: the backbone's, ()."""
        first, tail = self.at_start, self.tail
        constants = {"momentum": config.momentum, "decay": config.weight_decay}
        for number, (layer, out) in enumerate(zip(tail.layers, self._layers, strict=True)):
            pair = slice(2 * number, 2 * number + 2)
            start, anchors = tail.start[number] if first else out[:2], None if anchor is None else anchor[pair]
            update_folded_(
                gradients[pair], anchors, start, layer.norm, out, first=first, rate=rate, scale=scale, **constants
            )
        gradient = (gradients[-1] + (0 if anchor is None else anchor[-1])) / scale
        weight, velocity = self.leaves[-1], self._classifier_velocity
        gradient.add_(weight, alpha=config.weight_decay)
        velocity.copy_(gradient if first else velocity.mul_(config.momentum).add_(gradient))
        self._leaves[-1].copy_(weight - rate * config.classifier_lr_scale * velocity)
        self.at_start = False


def empty_leaves(tail: Tail) -> list[Tensor]:
    """In the tail's type, but for the classifier's weight, which is its own master."""
    folded = [torch.empty_like(p, dtype=tail.dtype) for weight, affine in tail.start for p in (weight, affine[0])]
    return [*folded, torch.empty_like(tail.classifier)]


def _float(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().float().clone()
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
