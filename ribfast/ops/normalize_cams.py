"""Dividing each map by its maximum: wrapper, contract, fake kernels; no gradient."""

import torch
from torch import Tensor

from .. import _ext, reference
from . import contract
from .registration import refuse_gradient, run_as_is_under_autocast


def normalize_cams(cams: Tensor, eps: float = 1e-5, *, inplace: bool = False) -> Tensor:
    """Divide each map by (its maximum + eps).

    cams: (..., H, W) in float64, float32, float16 or bfloat16. Returns the same shape and dtype; `inplace` writes
    into cams and returns it. A map that holds NaN becomes NaN and leaves the others alone.
    """
    contract.tensor("normalize_cams", "cams", cams)
    if cams.ndim < 2:
        raise ValueError(f"normalize_cams: expected cams (..., H, W), got shape {tuple(cams.shape)}")
    contract.positions("normalize_cams", "cams", cams)
    eps = contract.number("normalize_cams", "eps", eps, at_least=0)
    if _ext.backend("normalize_cams", cams.device).name == "reference":
        return reference.normalize_cams(cams, eps, inplace=inplace)
    if inplace:
        torch.ops.ribfast.normalize_cams_(cams, eps)
        return cams
    return torch.ops.ribfast.normalize_cams(cams, eps)


@torch.library.register_fake("ribfast::normalize_cams")
def _(cams, eps):
    return cams.new_empty(cams.shape)


@torch.library.register_fake("ribfast::normalize_cams_")
def _(cams, eps):
    return None


for _name in ("normalize_cams", "normalize_cams_"):
    refuse_gradient(_name, "detach() it, or call ribfast.reference.normalize_cams")
    run_as_is_under_autocast(_name)
