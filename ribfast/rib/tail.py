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

    @property
    def spatial(self) -> bool:
        """Whether it looks beyond its cell, so that its input's gutter has to be zero."""
        return self.weight.shape[2] > 1


class Tail:
    """What the adapted images share: the structure, theta_0 and the statistics."""

    def __init__(self, model: CamClassifier, dtype: torch.dtype):
        self.dtype = dtype
        self.blocks, self.layers = [], []
        for layers, adds, projection, activation in model.tail_blocks():
            numbers = [self._append(layer) for layer in layers]
            self.blocks.append((numbers, adds, None if projection is None else self._append(projection), activation))
        layers = self.layers
        weights = [layer.weight for layer in layers] + [_float(model.classifier.weight)]
        self.start = weights, [layer.gamma for layer in layers], [layer.beta for layer in layers]  # theta_0
        self.leaves = [torch.empty_like(t, dtype=dtype) for kind in (weights, self.start[2]) for t in kind]
        fold(layers, *self.start, self.leaves)
        for leaf in self.leaves:
            leaf.requires_grad_()
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
        leaves = weights.leaves

        def convolve(x, number, masked):
            weight, bias = leaves[number], leaves[len(self.layers) + 1 + number]
            return _Convolve.apply(x, weight, bias, self.layers[number], masks if masked else None)

        for block, (numbers, adds, projection, activation) in enumerate(self.blocks):
            y = x
            for number, follower in zip(numbers, [*numbers[1:], None], strict=True):
                y = convolve(y, number, follower is not None and self.layers[follower].spatial)
            if projection is not None:
                x = convolve(x, projection, False)
            if adds:
                spatial = block + 1 < len(self.blocks) and self.layers[self.blocks[block + 1][0][0]].spatial
                y = _Add.apply(y, x, activation, masks if spatial else None)
            x = y
        return F.conv2d(x, leaves[len(self.layers)])[0].flatten(1)


def _activate(y: Tensor, activation: str, masks) -> None:
    """In place. A masked value is 0, so its gradient is 0 as well."""
    if activation == "relu":
        y.relu_()
    elif activation == "relu6":
        F.hardtanh_(y, 0.0, 6.0)
    if masks is not None:
        y.mul_(masks[y.shape[2] != masks[0].shape[2]])


def _activate_backward(gradient: Tensor, y: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.ops.aten.threshold_backward(gradient, y, 0)
    return torch.ops.aten.hardtanh_backward(gradient, y, 0, 6) if activation == "relu6" else gradient


class _Convolve(torch.autograd.Function):
    """Convolution, bias, activation and the zeros of the gutter."""

    @staticmethod
    def forward(ctx, x, weight, bias, layer, masks):
        padding, padded = layer.padding, x
        if padding is None:
            padding, padded = 0, F.pad(x, (0, 1, 0, 1))
        y = F.conv2d(padded, weight, bias, layer.stride, padding, 1, layer.groups)
        _activate(y, layer.activation, masks)
        ctx.layer = layer
        ctx.save_for_backward(padded, weight, y if layer.activation else None)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, weight, y = ctx.saved_tensors
        layer, wanted = ctx.layer, ctx.needs_input_grad[0]
        gradient = _activate_backward(gradient, y, layer.activation)
        if weight.shape[2] == 1 and layer.stride == 1 and weight.dtype != torch.float32:
            rows, columns = _matrix(gradient), _matrix(x)
            for_x = None
            if wanted:
                for_x = (rows @ weight[:, :, 0, 0]).view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)
            for_weight = (rows.T @ columns)[:, :, None, None]
            return for_x, for_weight, rows.sum(0), None, None
        padding = 0 if layer.padding is None else layer.padding
        for_x, for_weight, for_bias = torch.ops.aten.convolution_backward(
            gradient, x, weight, [len(weight)], [layer.stride] * 2, [padding] * 2, [1, 1], False, [0, 0], layer.groups,
            [wanted, True, True],
        )  # fmt: skip
        if wanted and layer.padding is None:
            for_x = for_x[:, :, :-1, :-1]
        return for_x, for_weight, for_bias, None, None


class _Add(torch.autograd.Function):
    """A block's end: y + x, activation, zeros of the gutter; in place of y."""

    @staticmethod
    def forward(ctx, y, x, activation, masks):
        y.add_(x)
        _activate(y, activation, masks)
        ctx.mark_dirty(y)
        ctx.activation = activation
        ctx.save_for_backward(y if activation else None)
        return y

    @staticmethod
    def backward(ctx, gradient):
        gradient = _activate_backward(gradient, *ctx.saved_tensors, ctx.activation)
        return gradient, gradient, None, None


def _matrix(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class Weights:
    """One adapted image's weights: float32 masters, and what the convolutions take, folded and in the tail's dtype.

    At theta_0 they are the tail's own; the first update writes the image's.
    """

    def __init__(self, tail: Tail):
        self.tail = tail
        self.masters, self.gammas, self.betas = ([torch.empty_like(t) for t in kind] for kind in tail.start)
        self.velocities = [torch.empty_like(t) for kind in tail.start for t in kind]
        self._leaves = [torch.empty_like(leaf, requires_grad=True) for leaf in tail.leaves]
        self.at_start = True

    @property
    def leaves(self) -> list[Tensor]:
        """The folded weights of every layer, the classifier's, then the biases of every layer."""
        return self.tail.leaves if self.at_start else self._leaves

    def reset(self) -> None:
        """Back to theta_0."""
        self.at_start = True

    def gradients(self, loss: Tensor, *, scale: float = 1.0) -> list[Tensor]:
        """Of the leaves; scale: what 16-bit gradients are multiplied by on their way."""
        return list(torch.autograd.grad(loss * scale, self.leaves))

    @torch.no_grad()
    def update(self, gradients: list[Tensor], rate: Tensor, config, *, scale: float = 1.0) -> None:
        """A step of SGD on the masters, by the leaves' gradients; rate: of the backbone, () float32."""
        count = len(self.tail.layers)
        masters, gammas, betas = self.tail.start if self.at_start else (self.masters, self.gammas, self.betas)

        def move(number, parameter, gradient, rate, out):
            velocity = self.velocities[number]
            if self.at_start:
                torch.add(gradient, parameter, alpha=config.weight_decay, out=velocity)
            else:
                velocity.mul_(config.momentum).add_(gradient).add_(parameter, alpha=config.weight_decay)
            torch.addcmul(parameter, velocity, -rate, out=out)

        for i, layer in enumerate(self.tail.layers):
            gradient = gradients[i].float() / scale
            bias = gradients[count + 1 + i].float() / scale
            for_gamma = layer.inverse * ((gradient * masters[i]).sum((1, 2, 3)) - layer.mean * bias)
            gradient = gradient * (gammas[i] * layer.inverse)[:, None, None, None]
            move(i, masters[i], gradient, rate, self.masters[i])
            move(count + 1 + i, gammas[i], for_gamma, rate, self.gammas[i])
            move(2 * count + 1 + i, betas[i], bias, rate, self.betas[i])
        gradient = gradients[count].float() / scale
        move(count, masters[count], gradient, rate * config.classifier_lr_scale, self.masters[count])
        fold(self.tail.layers, self.masters, self.gammas, self.betas, self._leaves)
        self.at_start = False


@torch.no_grad()
def fold(layers, masters, gammas, betas, leaves) -> None:
    """Into leaves: the weights and biases that convolutions take, batch normalisation included."""
    for i, layer in enumerate(layers):
        scale = gammas[i] * layer.inverse
        torch.mul(masters[i], scale[:, None, None, None], out=leaves[i])
        leaves[len(layers) + 1 + i].copy_(betas[i] - layer.mean * scale)
    leaves[len(layers)].copy_(masters[len(layers)])


def _float(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().float()
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
