"""Global non-discriminative region pooling: wrapper, contract, fake kernels, autograd, autocast."""

import torch
from torch import Tensor

from .. import _ext, reference
from . import contract
from .registration import call_in_backward, register_gradient, run_as_is_under_autocast


def gndrp(maps: Tensor, present: Tensor, tau: float = 0.4, *, divide_by: str = "kept", strict: bool = False) -> Tensor:
    """Pool each class's map only where it is not yet discriminative.

    maps: (N, C, H, W) logits in float64, float32, float16 or bfloat16. present: (N, C) bool.
    Returns (N, C) pooled logits in float32 (float64 for float64 maps): for present classes the mean over
    {u : map(u) / max map <= tau}, 0 where that is empty; for absent classes the plain mean.
    RIB's released code is `divide_by="all", strict=True`: it divides by H*W and takes < for <=.
    The mask carries no gradient. A map that holds NaN pools to NaN and leaves the others alone.
    """
    contract.tensor("gndrp", "maps", maps, 4, "(N, C, H, W)")
    contract.positions("gndrp", "maps", maps)
    if not isinstance(present, Tensor) or present.dtype != torch.bool:
        got = present.dtype if isinstance(present, Tensor) else type(present).__name__
        raise TypeError(f"gndrp: expected present to be a bool tensor (N, C), got {got}")
    if present.shape != maps.shape[:2]:
        raise ValueError(f"gndrp: expected present of shape {tuple(maps.shape[:2])}, the maps' (N, C), "
                         f"got {tuple(present.shape)}")  # fmt: skip
    contract.same_device("gndrp", maps, present)
    tau = contract.number("gndrp", "tau", tau)
    if divide_by not in ("kept", "all"):
        raise ValueError(f"gndrp: expected divide_by to be 'kept' or 'all', got {divide_by!r}")
    if _ext.backend("gndrp", maps.device).name == "reference":
        return reference.gndrp(maps, present, tau, divide_by=divide_by, strict=strict)
    return torch.ops.ribfast.gndrp.default(maps, present, tau, divide_by == "all", bool(strict))[0]


@torch.library.register_fake("ribfast::gndrp")
def _(maps, present, tau, divide_by_all, strict):
    pooled = maps.new_empty(maps.shape[:2], dtype=reference.accumulator_dtype(maps.dtype))
    return pooled, pooled.new_empty((*maps.shape[:2], 2))


@torch.library.register_fake("ribfast::gndrp_backward")
def _(grad, maps, present, stats, tau, strict):
    return maps.new_empty(maps.shape)


def _save(ctx, inputs, output):
    maps, present, ctx.tau, _, ctx.strict = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(maps, present, output[1])


def _backward(ctx, grad, _):
    maps, present, stats = ctx.saved_tensors
    backward = torch.ops.ribfast.gndrp_backward.default
    grad_maps = call_in_backward(backward, grad, maps, present, stats, ctx.tau, ctx.strict)
    return grad_maps, None, None, None, None


def _save_backward(ctx, inputs, output):
    grad, maps, present, stats, ctx.tau, ctx.strict = inputs
    ctx.dtype = grad.dtype
    ctx.save_for_backward(maps, present, stats)


def _backward_of_backward(ctx, grad):
    maps, present, stats = ctx.saved_tensors
    ones = stats.new_ones(present.shape)
    weights = torch.ops.ribfast.gndrp_backward(ones, maps.to(stats.dtype), present, stats, ctx.tau, ctx.strict)
    return (grad * weights).sum((2, 3)).to(ctx.dtype), None, None, None, None, None


register_gradient("gndrp", _backward, _save)
register_gradient("gndrp_backward", _backward_of_backward, _save_backward)
# 16-bit maps are read as they are: sums and results are float32 anyway
run_as_is_under_autocast("gndrp")
