"""A segmentation network's loss, without logits of the image's size: wrapper, contract, fake kernels, autograd."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _ext, reference
from . import contract
from .registration import call_in_backward, refuse_gradient, register_gradient, run_as_is_under_autocast

_OP = "segmentation_loss"
_FITS = {None: 0, "clamp": 1, "ignore": 2, "pow": 3}


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    under_fitting: str | None = None,
    beta: float = 0.5,
    k: float = 0.5,
    balanced: bool = False,
    reduce: Callable[[Tensor], Tensor | None] | None = None,
    world: int = 1,
    counts: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the logits (N, L, h, w), enlarged to the labels' size, as a scalar in float32.

    labels: (N, H, W) uint8, below L (at most 255), or 255: ignored. A label between is an error on the CPU; on CUDA
    devices, where nothing waits to see it, it is ignored. Logits are enlarged bilinearly (align_corners=False).

    under_fitting None: the mean over labelled pixels, 0 where there are none. Pretended under-fitting: the mean over
    all pixels, ignored ones counting as 0; where that is below beta, of "clamp": min(l, k), "ignore": l, but 0 above k,
    "pow": l ** k (k at most 1; below l = 1e-6 the chord to 0, whose slope is finite). balanced: the mean of the
    background's (label 0) and the foreground's mean over their labelled pixels, or the one that there is; beta is
    still compared with the mean over all pixels.

    reduce adds up a float64 tensor over `world` processes, in place or by what it returns: means and the comparison
    with beta are then those of the whole batch, and the loss is this process's share times world: its mean over the
    processes, and that of its gradients, are the whole batch's. counts: (3,) float64, pixels, labelled background and
    labelled foreground of a batch that is given in parts, whose losses and gradients add up: means are over these,
    beta is compared with the part's own mean.
    """
    _check(logits, labels, counts)
    if under_fitting not in _FITS:
        raise ValueError(f"{_OP}: expected under_fitting to be None, 'clamp', 'ignore' or 'pow', got {under_fitting!r}")
    beta, k = contract.number(_OP, "beta", beta), contract.number(_OP, "k", k)
    world = contract.integer(_OP, "world", world, 1, 2**31 - 1)
    if k <= 0 or (under_fitting == "pow" and k > 1):
        raise ValueError(f"{_OP}: expected k above 0, and at most 1 as a power, got {k}")
    if _ext.backend(_OP, logits.device).name == "reference":
        options = dict(under_fitting=under_fitting, beta=beta, k=k, balanced=balanced, world=world, counts=counts)
        options["reduce"] = None if reduce is None else functools.partial(_reduced, reduce)
        return reference.segmentation_loss(logits, labels, **options).float()
    still, add_up = logits.detach(), torch.ops.ribfast.pixel_loss_sums.default
    losses = torch.ops.ribfast.pixel_losses.default(still, labels)
    sums = add_up(logits if under_fitting is None else still, labels, losses, None, 0, k)
    found = sums.detach()
    totals = torch.cat([found[:2].sum(0, keepdim=True), found.new_full((1,), labels.numel()), found[2:]])
    if reduce is not None:
        totals = _reduced(reduce, totals)
    if under_fitting is not None:
        active = totals[0] < beta * totals[1]
        sums = add_up(logits, labels, losses, active, _FITS[under_fitting], k)
    sizes = _sizes(totals[1:] if counts is None else counts, under_fitting is not None, balanced)
    return (world * (sums[:2] / sizes).sum()).float()


def _sizes(counts: Tensor, over_all: bool, balanced: bool) -> Tensor:
    """What the sums of background and foreground are divided by."""
    labelled = counts[1:]
    if balanced:
        return labelled.clamp(min=1) * (labelled > 0).sum().clamp(min=1)
    return (counts[:1] if over_all else labelled.sum(0, keepdim=True)).clamp(min=1)


def _reduced(reduce, totals: Tensor) -> Tensor:
    found = reduce(totals)
    if found is None:
        return totals
    if not isinstance(found, Tensor) or found.shape != totals.shape:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"{_OP}: expected reduce to return the summed tensor (4,) or None, got {got}; let it wait")
    return found


def _check(logits, labels, counts) -> None:
    contract.tensor(_OP, "logits", logits, 4, "(N, L, h, w)")
    contract.positions(_OP, "logits", logits)
    if not 1 <= logits.shape[1] <= 255:
        raise ValueError(f"{_OP}: expected logits of 1 to 255 labels, got shape {tuple(logits.shape)}")
    if not isinstance(labels, Tensor) or labels.dtype != torch.uint8:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{_OP}: expected labels to be a uint8 tensor (N, H, W), got {got}")
    if labels.ndim != 3 or labels.shape[0] != logits.shape[0]:
        raise ValueError(f"{_OP}: expected labels (N, H, W) of the logits' {logits.shape[0]} images, "
                         f"got shape {tuple(labels.shape)}")  # fmt: skip
    contract.positions(_OP, "labels", labels)
    contract.same_device(_OP, logits, labels)
    if counts is None:
        return
    if not isinstance(counts, Tensor) or counts.dtype != torch.float64:
        got = counts.dtype if isinstance(counts, Tensor) else type(counts).__name__
        raise TypeError(f"{_OP}: expected counts to be a float64 tensor (3,), got {got}")
    if counts.shape != (3,):
        raise ValueError(f"{_OP}: expected counts (3,), got shape {tuple(counts.shape)}")
    contract.same_device(_OP, logits, counts)


@torch.library.register_fake("ribfast::pixel_losses")
def _(logits, labels):
    return logits.new_empty(labels.shape, dtype=torch.float32)


@torch.library.register_fake("ribfast::pixel_loss_sums")
def _(logits, labels, losses, active, fit, k):
    return logits.new_empty(4, dtype=torch.float64)


@torch.library.register_fake("ribfast::pixel_loss_sums_backward")
def _(grad, logits, labels, losses, active, fit, k):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.fit, ctx.k = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    backward = torch.ops.ribfast.pixel_loss_sums_backward.default
    grad_logits = call_in_backward(backward, grad, *ctx.saved_tensors, ctx.fit, ctx.k)
    return grad_logits, None, None, None, None, None


register_gradient("pixel_loss_sums", _backward, _save)
for _name in ("pixel_losses", "pixel_loss_sums", "pixel_loss_sums_backward"):
    run_as_is_under_autocast(_name)
refuse_gradient("pixel_losses", "detach() it: pixel_loss_sums has the gradient of the logits")
refuse_gradient("pixel_loss_sums_backward", "second derivatives of the loss are not there; use ribfast.reference")
