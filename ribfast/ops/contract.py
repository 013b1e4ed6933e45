"""What operators ask of their arguments, in the one form of error: "op: expected X, got Y"."""

import math
import operator
import sys

import torch
from torch import Tensor

LARGEST = sys.float_info.max
LONGEST_SIDE = 2**24 - 1  # float32 tells positions apart up to here
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


def stacked(op: str, first: str, a, second: str, b) -> bool:
    """Whether two arguments are tensors that hold all images' at once, rather than lists of each image's."""
    if isinstance(a, Tensor) != isinstance(b, Tensor):
        raise TypeError(f"{op}: expected {first} and {second} to be two tensors or two lists, "
                        f"got {type(a).__name__} and {type(b).__name__}")  # fmt: skip
    return isinstance(a, Tensor)


def paired(op: str, first: str, a, second: str, b, each: str) -> tuple[list, list]:
    """What each image has of both; each: what it needs of the second one, in the error."""
    for value, what in ((a, first), (b, second)):
        if not hasattr(value, "__iter__"):
            raise TypeError(f"{op}: expected {what} to be a tensor or a list of tensors, got {type(value).__name__}")
    each_a, each_b = list(a), list(b)
    if len(each_a) != len(each_b):
        raise ValueError(f"{op}: expected {each} for each image, got {len(each_b)} for {len(each_a)}")
    return each_a, each_b


def labels(op: str, name: str, value) -> None:
    """A label map."""
    if not isinstance(value, Tensor) or value.dtype != torch.uint8:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{op}: expected {name} to be a uint8 tensor (H, W), got {got}")
    if value.ndim != 2:
        raise ValueError(f"{op}: expected {name} (H, W), got shape {tuple(value.shape)}")


def count(op: str, name: str, value, *, most: int) -> int:
    """An integer from 1 to `most`."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, Tensor):
        raise TypeError(f"{op}: expected {name} to be an integer, got {type(value).__name__}")
    if not 1 <= operator.index(value) <= most:
        raise ValueError(f"{op}: expected {name} from 1 to {most}, got {value}")
    return operator.index(value)


def number(op: str, name: str, value, *, at_least: float = -math.inf) -> float:
    """A finite number."""
    if not isinstance(value, (int, float)):  # torch.compile passes symbolic ones off as these
        if isinstance(value, (Tensor, str)) or getattr(value, "shape", ()) != () or not hasattr(value, "__float__"):
            raise TypeError(f"{op}: expected {name} to be a number, got {type(value).__name__}")
        value = float(value)
    if not (max(at_least, -LARGEST) <= value <= LARGEST):
        bound = "" if at_least == -math.inf else f" of at least {at_least:g}"
        raise ValueError(f"{op}: expected {name} to be a finite number{bound}, got {value}")
    return float(value) if type(value) is int else value  # operators take 64 bits of an int


def integer(op: str, name: str, value, least: int, most: int | None = None) -> int:
    """An integer of at least `least` and at most `most`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{op}: expected {name} to be an integer, got {type(value).__name__}")
    value = operator.index(value)
    if value < least or (most is not None and value > most):
        bound = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{op}: expected {name} {bound}, got {value}")
    return value


def size(op: str, name: str, value) -> tuple[int, int]:
    """An (H, W) pair of positive integers."""
    try:
        height, width = value
    except (TypeError, ValueError):
        raise ValueError(f"{op}: expected {name} to be (H, W), got {value!r}") from None
    sides = []
    for side in (height, width):
        if isinstance(side, bool) or not (isinstance(side, int) or hasattr(side, "__index__")):
            raise TypeError(f"{op}: expected {name} to be a pair of integers (H, W), got {value!r}")
        sides.append(side if isinstance(side, int) else operator.index(side))
    height, width = sides
    if height < 1 or width < 1 or height > LONGEST_SIDE or width > LONGEST_SIDE:
        raise ValueError(f"{op}: expected {name} of at least (1, 1) and at most 2^24 a side, got ({height}, {width})")
    return height, width
