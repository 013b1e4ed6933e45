"""What operators ask of their arguments, in the one form of error: "op: expected X, got Y"."""

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensor(op: str, name: str, value, ndim: int | None = None, shape: str = "") -> None:
    """A tensor of floats with `ndim` dimensions, described by `shape`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor {shape}, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: expected {name} in float64, float32, float16 or bfloat16, got {value.dtype}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{op}: expected {name} {shape}, got shape {tuple(value.shape)}")


def positions(op: str, name: str, value: Tensor) -> None:
    if 0 in value.shape[-2:]:
        raise ValueError(f"{op}: expected {name} with at least one row and column, got shape {tuple(value.shape)}")


def same_device(op: str, first: Tensor, *others: Tensor) -> None:
    for other in others:
        if other.device != first.device:
            raise ValueError(f"{op}: expected all tensors on one device, got {first.device} and {other.device}")


def number(op: str, name: str, value, *, at_least: float = -math.inf) -> float:
    """A finite number, as a float."""
    if isinstance(value, Tensor) or not hasattr(value, "__float__"):
        raise TypeError(f"{op}: expected {name} to be a number, got {type(value).__name__}")
    value = float(value)
    if not math.isfinite(value) or value < at_least:
        bound = "" if at_least == -math.inf else f" of at least {at_least:g}"
        raise ValueError(f"{op}: expected {name} to be a finite number{bound}, got {value}")
    return value


def size(op: str, name: str, value) -> tuple[int, int]:
    """An (H, W) pair of positive integers."""
    try:
        height, width = value
    except (TypeError, ValueError):
        raise ValueError(f"{op}: expected {name} to be (H, W), got {value!r}") from None
    for side in (height, width):
        if isinstance(side, bool) or not hasattr(side, "__index__"):
            raise TypeError(f"{op}: expected {name} to be a pair of integers (H, W), got {value!r}")
    if height < 1 or width < 1:
        raise ValueError(f"{op}: expected {name} of at least (1, 1), got ({height}, {width})")
    return height, width
