"""What IRN's loss is made of, without a tensor of pairs: wrapper, contract, fake kernels, autograd, autocast."""

import torch
from torch import Tensor

from .. import _ext, reference
from . import contract
from .path_affinity import check_radius
from .registration import call_in_backward, refuse_gradient, register_gradient, run_as_is_under_autocast

_OP = "pair_losses"


def pair_losses(boundary: Tensor, displacement: Tensor, labels: Tensor, radius: int = 10) -> Tensor:
    """Sums over the pairs of pixels closer than radius, and how many pairs of each kind there are: (8,) float32.

    boundary: (N, h, w) in [0, 1]; displacement: (N, 2, h, w), y before x; labels: (N, h, w) uint8, 0 for background,
    255 for unknown. In order: of pairs of background the sum of -log(a + 1e-5), of pairs of one class the same, of
    pairs of two labels that of -log(1 + 1e-5 - a), with a = `path_affinity`; of pairs (i, j) of one class the L1
    distance between D(i) - D(j) and j - i, of pairs of background between it and 0; then the counts of background, one
    class and two labels. Pairs begin at pixels whose neighbours are all inside: radius - 1 columns at both sides and
    as many rows at the bottom are ends alone. Gradients of boundary and displacement.
    """
    contract.tensor(_OP, "boundary", boundary, 3, "(N, h, w)")
    contract.tensor(_OP, "displacement", displacement, 4, "(N, 2, h, w)")
    count, height, width = boundary.shape
    if tuple(displacement.shape) != (count, 2, height, width):
        raise ValueError(f"{_OP}: expected displacement of shape {(count, 2, height, width)}, the boundary's, "
                         f"got {tuple(displacement.shape)}")  # fmt: skip
    if not isinstance(labels, Tensor) or labels.dtype != torch.uint8:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{_OP}: expected labels to be a uint8 tensor (N, h, w), got {got}")
    if labels.shape != boundary.shape:
        raise ValueError(f"{_OP}: expected labels of shape {tuple(boundary.shape)}, the boundary's, "
                         f"got {tuple(labels.shape)}")  # fmt: skip
    contract.positions(_OP, "boundary", boundary)
    contract.same_device(_OP, boundary, displacement, labels)
    radius = check_radius(_OP, radius)
    if _ext.backend(_OP, boundary.device).name == "cpp":
        return torch.ops.ribfast.pair_losses.default(boundary, displacement, labels, radius)
    return reference.pair_losses(boundary.float(), displacement.float(), labels, radius)


@torch.library.register_fake("ribfast::pair_losses")
def _(boundary, displacement, labels, radius):
    return boundary.new_empty(8, dtype=torch.float32)


@torch.library.register_fake("ribfast::pair_losses_backward")
def _(grad, boundary, displacement, labels, radius):
    return boundary.new_empty(boundary.shape), displacement.new_empty(displacement.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.radius = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    backward = torch.ops.ribfast.pair_losses_backward.default
    return *call_in_backward(backward, grad, *ctx.saved_tensors, ctx.radius), None, None


register_gradient("pair_losses", _backward, _save)
for _name in ("pair_losses", "pair_losses_backward", "path_affinity_backward"):
    run_as_is_under_autocast(_name)
for _name in ("pair_losses_backward", "path_affinity_backward"):
    refuse_gradient(_name, "second derivatives of affinities are not there; use ribfast.reference")
