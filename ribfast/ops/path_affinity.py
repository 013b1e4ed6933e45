"""Affinities of neighbouring pixels by the largest boundary between them: contract, fakes, autograd, autocast."""

import torch
from torch import Tensor

from .. import _ext, reference
from . import contract
from .registration import call_in_backward, register_gradient, run_as_is_under_autocast

_OP = "path_affinity"
LARGEST_RADIUS = 16


def pair_offsets(radius: int) -> list[tuple[int, int]]:
    """(y, x) of the pairs, in order: (0, 1) to (0, radius - 1), then rows of what is below, closer than radius."""
    return reference.pair_offsets(check_radius("pair_offsets", radius))


def path_affinity(boundary: Tensor, radius: int = 5, beta: float = 1.0) -> Tensor:
    """How alike each pixel and its neighbours are: (1 - the largest boundary on the path between them) ** beta.

    boundary: (N, h, w) or (h, w) in [0, 1]. Returns (N, P, h, w) or (P, h, w) in float32 (float64 is computed in
    float32 too) of `pair_offsets(radius)`; 0 for neighbours outside the map. A path holds both ends and the pixels of
    their bounding box closer than 1 to the line between them. The gradient goes to the path's first largest pixel.
    """
    contract.tensor(_OP, "boundary", boundary)
    if boundary.ndim not in (2, 3):
        raise ValueError(f"{_OP}: expected boundary (N, h, w) or (h, w), got shape {tuple(boundary.shape)}")
    contract.positions(_OP, "boundary", boundary)
    radius, beta = check_radius(_OP, radius), contract.number(_OP, "beta", beta, at_least=0)
    if beta == 0:
        raise ValueError(f"{_OP}: expected beta above 0, got 0; every pair would be alike")
    maps = boundary if boundary.ndim == 3 else boundary[None]
    if _ext.backend(_OP, boundary.device).name == "cpp":
        result = torch.ops.ribfast.path_affinity.default(maps, radius, beta)
    else:
        result = reference.path_affinity(maps.float(), radius, beta)
    return result if boundary.ndim == 3 else result[0]


def check_radius(op: str, radius) -> int:
    if isinstance(radius, bool) or not hasattr(radius, "__index__"):
        raise TypeError(f"{op}: expected radius to be an integer, got {type(radius).__name__}")
    radius = radius.__index__()
    if not 2 <= radius <= LARGEST_RADIUS:
        raise ValueError(f"{op}: expected radius from 2 to {LARGEST_RADIUS}, got {radius}")
    return radius


@torch.library.register_fake("ribfast::path_affinity")
def _(boundary, radius, beta):
    count, height, width = boundary.shape
    pairs = len(reference.pair_offsets(radius))
    return boundary.new_empty((count, pairs, height, width), dtype=torch.float32)


@torch.library.register_fake("ribfast::path_affinity_backward")
def _(grad, boundary, radius, beta):
    return boundary.new_empty(boundary.shape)


def _save(ctx, inputs, output):
    boundary, ctx.radius, ctx.beta = inputs
    ctx.save_for_backward(boundary)


def _backward(ctx, grad):
    (boundary,) = ctx.saved_tensors
    backward = torch.ops.ribfast.path_affinity_backward.default
    return call_in_backward(backward, grad, boundary, ctx.radius, ctx.beta), None, None


register_gradient("path_affinity", _backward, _save)
run_as_is_under_autocast("path_affinity")
