"""Networks whose batch normalisation, by its running statistics, is folded into the convolutions before it: the same
function, to rounding, without a pass over every activation."""

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .classifier import CamClassifier


@torch.no_grad()
def folded(model: CamClassifier) -> CamClassifier:
    """A copy that computes the same, without gradients of its parameters."""
    if not isinstance(model, CamClassifier):  # whose normalisations are known to come right after their convolutions
        raise TypeError(f"folded: expected a CamClassifier, got {type(model).__name__}")
    twin, pairs = copy.deepcopy(model).eval().requires_grad_(False), list(_pairs(model))
    for name, convolution, norm_name, norm in pairs:
        place, _, last = norm_name.rpartition(".")
        setattr(twin.get_submodule(place), last, nn.Identity())
        weight, bias = _fold(convolution, norm)
        own = twin.get_submodule(name)
        own.weight.copy_(weight)
        own.bias = nn.Parameter(bias, requires_grad=False)
    return twin


def trained_folded(model: CamClassifier) -> dict[str, Tensor]:
    """The parameters of `folded(model)` that depend on what trains, with gradients of the model's own parameters: for
    torch.func.functional_call of the copy."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, convolution, norm_name, norm in _pairs(model):
        own = [f"{name}.weight", f"{norm_name}.weight", f"{norm_name}.bias"]
        if any([found.pop(each, None) is not None for each in own]):
            found[f"{name}.weight"], found[f"{name}.bias"] = _fold(convolution, norm)
    return found


def _pairs(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d, str, nn.BatchNorm2d]]:
    """Convolutions and what follows them, by their names."""
    for prefix, module in model.named_modules():
        prefix = prefix and f"{prefix}."
        for (name, convolution), (norm_name, norm) in itertools.pairwise(module.named_children()):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                yield prefix + name, convolution, prefix + norm_name, norm


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return convolution.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale
