"""What stands between the convolutions of a network that is adapted to an image; for `ribfast.rib`, not for users.

Compiled for the CPU and CUDA, without Triton kernels. Tensors (N, C, H, W) are channels last. Nothing here waits for
the device, so all of it can be captured in a CUDA graph.
"""

import math

import torch
from torch import Tensor

from .. import _ext, reference
from .registration import refuse_gradient, run_as_is_under_autocast

_OP = "adapt"


def _compiled(tensor: Tensor) -> bool:
    return _ext.backend(_OP, tensor.device).name == "cpp"


def activate_(y: Tensor, shortcut: Tensor | None = None, mask: Tensor | None = None, limit: float = math.inf) -> Tensor:
    """y in place: min(max(y + shortcut, 0), limit), and 0 where the mask (N, 1, H, W) is 0."""
    if _compiled(y):
        torch.ops.ribfast.activate_.default(y, shortcut, mask, limit)
        return y
    return y.copy_(reference.activate(y, shortcut, mask, limit))


def activate_backward(grad: Tensor, y: Tensor, limit: float = math.inf) -> tuple[Tensor, Tensor]:
    """The gradient before `activate_`, whose result is y; and its sum over all but the channels, of a bias."""
    if _compiled(y):
        grad = grad.contiguous(memory_format=torch.channels_last)
        return torch.ops.ribfast.activate_backward.default(grad, y, limit)
    return reference.activate_backward(grad, y, limit)


def update_folded_(
    grads, anchors, start, norm, out, *, first: bool, rate: Tensor, momentum: float, decay: float, scale: float
) -> None:
    """A step of SGD on a layer's weight and affine parameters (2, O), by the gradients of what they are folded into.

    grads: of the folded weight and bias, times scale; anchors: added to them, or None; start: weight, affine, which are
    read; out: weight, affine, their velocities, the folded weight and bias, which are written; first: whether
    velocities begin here; rate: () float32. `reference.update_folded` has the formulas.
    """
    if _compiled(start[0]):
        # convolutions may hand their gradients back in another layout
        pairs = [(None, None) if pair is None else (pair[0].contiguous(memory_format=torch.channels_last), pair[1])
                 for pair in (grads, anchors)]  # fmt: skip
        torch.ops.ribfast.update_folded_.default(
            *pairs[0], *pairs[1], *start, norm, *out, first, rate, momentum, decay, scale
        )
        return
    grads = [grad.float() / scale for grad in grads]
    if anchors is not None:
        grads = [grad + anchor.float() / scale for grad, anchor in zip(grads, anchors, strict=True)]
    velocities = (None, None) if first else out[2:4]
    found = reference.update_folded(*grads, *start, norm, *velocities, rate=rate, momentum=momentum, decay=decay)
    for target, value in zip(out, found, strict=True):
        target.copy_(value)


@torch.library.register_fake("ribfast::activate_")
def _(y, shortcut, mask, limit):
    return None


@torch.library.register_fake("ribfast::activate_backward")
def _(grad, y, limit):
    return torch.empty_like(y), y.new_empty(y.shape[1], dtype=reference.accumulator_dtype(y.dtype))


@torch.library.register_fake("ribfast::update_folded_")
def _(*arguments):
    return None


for _name in ("activate_", "activate_backward", "update_folded_"):
    run_as_is_under_autocast(_name)
    refuse_gradient(_name, "detach() it: these are parts of gradients themselves")
