"""What every operator computes, in plain torch: slow, obvious, differentiable. Kernels are compared with this file.

Sums are held in float32 (float64 for float64 maps), whatever the maps are stored in.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def gndrp(maps: Tensor, present: Tensor, tau: float = 0.4, *, divide_by: str = "kept", strict: bool = False) -> Tensor:
    """Global non-discriminative region pooling: the mean of T over U_tau = {u : T(u) / max T <= tau}.

    `strict` takes < for <=, `divide_by="all"` divides by |U| (the released code does both). Absent classes get the
    plain mean. An empty U_tau gives 0. A map that holds NaN gives NaN.
    """
    flat = maps.to(accumulator_dtype(maps.dtype)).flatten(2)
    top = flat.detach().amax(2, keepdim=True) + 0.0  # + 0.0: a maximum of -0.0 counts as 0.0
    level = flat.detach() / top
    kept = level < tau if strict else level <= tau
    kept = kept | top.isnan() | ~present[..., None]
    total = torch.where(kept, flat, 0).sum(2)
    count = kept.sum(2).clamp(min=1) if divide_by == "kept" else flat.shape[2]
    return torch.where(present, total / count, flat.mean(2))


def accumulate_cams(maps, size, *, padded=None, relu: bool = True, out: Tensor | None = None) -> Tensor:
    """Sum over scales and views of the upsampled maps, the mirrored view turned back, ReLU before everything.

    maps: over scales, (V, C, h, w), view 1 being the map of the mirrored image. Each is interpolated
    (bilinear, align_corners=False) to `padded` and cut to `size` at the top left.
    """
    height, width = size
    total = 0
    for scale in maps:
        views = scale.to(accumulator_dtype(scale.dtype))
        views = views.relu() if relu else views
        merged = views[0] + views[1].flip(-1) if len(views) == 2 else views[0]
        large = F.interpolate(merged[None], tuple(padded or size), mode="bilinear", align_corners=False)[0]
        total = total + large[:, :height, :width]
    return total if out is None else out.add_(total)


def normalize_cams(cams: Tensor, eps: float = 1e-5, *, inplace: bool = False) -> Tensor:
    """Each (H, W) map divided by its maximum plus eps."""
    values = cams.to(accumulator_dtype(cams.dtype))
    result = (values / (values.amax((-2, -1), keepdim=True) + eps)).to(cams.dtype)
    return cams.copy_(result) if inplace else result
