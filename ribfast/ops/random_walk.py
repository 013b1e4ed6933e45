"""IRN's random walk over neighbouring pixels, without its matrix: wrapper, contract, fake kernel, autocast."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ext, reference
from . import contract
from .path_affinity import check_radius, path_affinity
from .registration import refuse_gradient, run_as_is_under_autocast

_OP = "random_walk"


def random_walk(
    cams: Tensor | Sequence[Tensor],
    boundary: Tensor | Sequence[Tensor] | None = None,
    *,
    affinity: Tensor | Sequence[Tensor] | None = None,
    beta: float = 10.0,
    log2_steps: int = 8,
    radius: int = 5,
) -> Tensor | list[Tensor]:
    """Class maps spread over pixels that are alike: cams * (1 - boundary) through 2^log2_steps steps of the walk.

    cams: (C, h, w) and boundary (h, w) in [0, 1], both with a leading N, or lists of them for images of any sizes.
    Returns float32 of the cams' shape. T holds (1 - the largest boundary between two pixels) ** beta of the pairs that
    are closer than radius, 1 on the diagonal, each column divided by its sum; a step is cams T. No matrix is made.
    affinity: (P, h, w) in [0, 1] of `pair_offsets(radius)` in place of the boundary, to the power beta too (PSA's, for
    instance); the cams are then taken as they are.
    Many steps are a Chebyshev series, which differs from them by at most 1e-10 sqrt(D pixels) of the largest value that
    walks, D = 1 + 2 P: 1e-6 at a million pixels; rounding by a few 1e-6.
    """
    if (boundary is None) == (affinity is None):
        raise ValueError(
            f"{_OP}: expected either boundary or affinity, got {'both' if affinity is not None else 'none'}"
        )
    radius, beta = check_radius(_OP, radius), contract.number(_OP, "beta", beta, at_least=0)
    if beta == 0:
        raise ValueError(f"{_OP}: expected beta above 0, got 0; every pair would be alike")
    if isinstance(log2_steps, bool) or not hasattr(log2_steps, "__index__"):
        raise TypeError(f"{_OP}: expected log2_steps to be an integer, got {type(log2_steps).__name__}")
    log2_steps = log2_steps.__index__()
    if not 0 <= log2_steps <= 16:
        raise ValueError(f"{_OP}: expected log2_steps from 0 to 16, got {log2_steps}")
    name, given = ("boundary", boundary) if affinity is None else ("affinity", affinity)
    each_cams, each_given, stacked = _paired(cams, given, name)
    for own, other in zip(each_cams, each_given, strict=True):
        _check(own, other, name, radius)
    if not each_cams:
        return torch.empty(cams.shape, device=cams.device) if isinstance(cams, Tensor) else []
    contract.same_device(_OP, *each_cams, *each_given)
    if affinity is None:
        if stacked:
            weights = list(path_affinity(boundary, radius, beta))
        else:
            weights = [path_affinity(edge, radius, beta) for edge in each_given]
        each_cams = [own.float() * (1 - edge.float()) for own, edge in zip(each_cams, each_given, strict=True)]
    else:
        weights = [other.float() ** beta for other in each_given]
    if _ext.backend(_OP, each_cams[0].device).name == "cpp":
        results = torch.ops.ribfast.random_walk.default(each_cams, weights, radius, 2**log2_steps)
    else:
        results = [reference.random_walk(own.float(), weight, 2**log2_steps)
                   for own, weight in zip(each_cams, weights, strict=True)]  # fmt: skip
    if stacked:
        return torch.stack(results)
    return results[0] if isinstance(cams, Tensor) else results


def _paired(cams, given, name: str) -> tuple[list, list, bool]:
    """Each image's cams and what belongs to them; whether they are stacked."""
    stacked = contract.stacked(_OP, "cams", cams, name, given)
    if stacked:
        below = 1 if name == "boundary" else 0  # dimensions that cams have before it
        if cams.ndim not in (3, 4) or given.ndim != cams.ndim - below:
            shapes = ("(h, w)", "(N, h, w)") if below else ("(P, h, w)", "(N, P, h, w)")
            raise ValueError(f"{_OP}: expected cams (C, h, w) and {name} {shapes[0]}, or cams (N, C, h, w) and {name} "
                             f"{shapes[1]}, got shapes {tuple(cams.shape)} and {tuple(given.shape)}")  # fmt: skip
        if cams.ndim == 3:
            return [cams], [given], False
    return *contract.paired(_OP, "cams", cams, name, given, f"a {name}"), stacked


def _check(cams, given, name: str, radius: int) -> None:
    contract.tensor(_OP, "cams", cams, 3, "(C, h, w)")
    contract.positions(_OP, "cams", cams)
    if name == "boundary":
        contract.tensor(_OP, name, given, 2, "(h, w)")
        expected = tuple(cams.shape[1:])
    else:
        contract.tensor(_OP, name, given, 3, "(P, h, w)")
        expected = (len(reference.pair_offsets(radius)), *cams.shape[1:])
    if tuple(given.shape) != expected:
        raise ValueError(f"{_OP}: expected {name} of shape {expected} for cams {tuple(cams.shape)} and radius "
                         f"{radius}, got {tuple(given.shape)}")  # fmt: skip
    if torch.compiler.is_compiling() or (given.is_cuda and torch.cuda.is_current_stream_capturing()):
        return  # a graph has no values yet
    if not (given.min() >= 0 and given.max() <= 1):  # a NaN is neither
        raise ValueError(f"{_OP}: expected {name} in [0, 1], got {given.min().item():g} to {given.max().item():g}")
    if not torch.isfinite(cams).all():
        raise ValueError(f"{_OP}: expected finite cams, got NaN or infinity, which a walk spreads over the whole image")


@torch.library.register_fake("ribfast::random_walk")
def _(cams, weights, radius, steps):
    return [own.new_empty(own.shape, dtype=torch.float32) for own in cams]


run_as_is_under_autocast(_OP)
refuse_gradient(_OP, "detach() them: the walk makes labels, it is not trained through")
