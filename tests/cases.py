"""Inputs that the tests of several operators and backends share."""

import math

import torch

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
# sizes that break tiles and vectors, single cells and lines, and the sizes of the benchmarks, reduced
MAP_SHAPES = [(2, 3, 32, 32), (3, 2, 63, 84), (1, 1, 1, 1), (2, 2, 1, 129), (1, 3, 151, 2), (1, 4, 5, 13)]


def tolerance(dtype):
    """For results in the accumulator of maps in `dtype`: both sides widen exactly, only the order of sums differs."""
    return dict(rtol=1e-10, atol=1e-12) if dtype == torch.float64 else dict(rtol=2e-5, atol=1e-5)


def rounding(dtype):
    """For results that are stored in `dtype`."""
    return {
        torch.float64: dict(rtol=1e-10, atol=1e-12),
        torch.float32: dict(rtol=2e-5, atol=1e-5),
        torch.float16: dict(rtol=2e-3, atol=2e-3),
        torch.bfloat16: dict(rtol=1.6e-2, atol=1.6e-2),
    }[dtype]


def logits(shape, dtype, device="cpu"):
    return torch.randn(shape, dtype=torch.float64).mul_(3).to(device, dtype)


def special_maps(dtype, device="cpu"):
    """(1, 10, 6, 11): every kind of map that divides by an odd maximum, and its names in order."""
    maps = logits((1, 10, 6, 11), dtype, device)
    maps[0, 0] = -maps[0, 0].abs() - 1  # all negative
    maps[0, 1] = 0
    maps[0, 2] = -maps[0, 2].abs()
    maps[0, 2, 0, 0] = 0  # maximum 0
    maps[0, 3] = -0.0
    maps[0, 4, 2, 3] = math.inf
    maps[0, 5, 2, 3] = -math.inf
    maps[0, 6] = -math.inf
    maps[0, 7] = 5  # constant: nothing below tau
    maps[0, 8] = torch.linspace(0, 1, 66, device=device, dtype=torch.float64).view(6, 11).to(dtype)  # many at tau
    return maps


def scales(size, counts, channels, dtype, device="cpu", views=2, stride=16):
    """Maps of an image of `size` at each of the factors `counts`, at least 1x1."""
    height, width = size
    return [
        logits((views, channels, max(1, round(height * f / stride)), max(1, round(width * f / stride))), dtype, device)
        for f in counts
    ]


def needing_grad(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]
