"""GNDRP(T) = 1/|U_tau| * sum over U_tau of T, U_tau = {u : T(u) / max T <= tau}.

Layout: maps (N, C, H, W) of any strides, copied if not contiguous; present (N, C) bool; pooled (N, C) and stats
(N, C, 2) = maximum, divisor in float32 (float64 for float64 maps), contiguous. The gradient has the maps' shape and
dtype, contiguous. Nothing is written in place. N * C = 0 launches nothing. One program and one read per map of up to
WHOLE_MAP pixels, two reads above.

Loops are `while`: the interpreter of Triton 3.6 takes no tensor as a bound of `range` with NumPy 2.4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WHOLE_MAP = 16384  # the largest map that a program holds in registers
CHUNK = 4096  # pixels at a time of a larger one
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check(holds: bool, error: type[Exception], op: str, expected: str, got) -> None:
    """What keeps memory safe when torch.ops.ribfast is called directly, as csrc/check.h does for C++."""
    if not holds:
        raise error(f"{op}: expected {expected}, got {got}")


def check_floats(op: str, name: str, tensor: Tensor) -> None:
    check(tensor.dtype in _FLOATS, TypeError, op, f"{name} in float64, float32, float16 or bfloat16", tensor.dtype)


def check_same_device(op: str, first: Tensor, *others: Tensor) -> None:
    for other in others:
        check(other.device == first.device, ValueError, op, "all tensors on one device",
              f"{first.device} and {other.device}")  # fmt: skip


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@triton.jit
def divide(x, y):
    """IEEE division: the plain `/` of float32 is approximate on CUDA, and a pixel at tau would change sides."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def _kept(x, top, tau, STRICT: tl.constexpr):
    level = divide(x, top)
    if STRICT:
        return level < tau
    else:
        return level <= tau


@triton.jit
def _pool(maps, present, pooled, stats, pixels: tl.int64, tau: tl.float64, DIVIDE_BY_ALL: tl.constexpr,
          STRICT: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    acc: tl.constexpr = pooled.dtype.element_ty
    plane = tl.program_id(0).to(tl.int64)
    maps += plane * pixels
    absent = tl.load(present + plane) == 0
    tau = tl.full([], tau, acc)
    lane = tl.arange(0, BLOCK)

    # Maxima pass over NaN here; the sum below finds them.
    if WHOLE:
        x = tl.load(maps + lane, mask=lane < pixels, other=-float("inf")).to(acc)
        top = tl.max(x, 0)
    else:
        running = tl.full([BLOCK], -float("inf"), acc)
        start = tl.zeros([], tl.int64)
        while start < pixels:
            x = tl.load(maps + start + lane, mask=start + lane < pixels, other=-float("inf")).to(acc)
            running = tl.where(x > running, x, running)
            start += BLOCK
        top = tl.max(running, 0)
    top = tl.where(top == 0, 0.0, top)  # -0.0 counts as 0.0

    # A NaN pixel is always added, so that the sum of a map that holds one is NaN.
    if WHOLE:
        kept = (lane < pixels) & (_kept(x, top, tau, STRICT) | (x != x) | absent)
        total = tl.sum(tl.where(kept, x, 0.0), 0)
        count = tl.sum(kept.to(tl.int32), 0).to(tl.int64)
    else:
        totals = tl.zeros([BLOCK], acc)
        counts = tl.zeros([BLOCK], tl.int64)
        start = tl.zeros([], tl.int64)
        while start < pixels:
            x = tl.load(maps + start + lane, mask=start + lane < pixels, other=0).to(acc)
            kept = (start + lane < pixels) & (_kept(x, top, tau, STRICT) | (x != x) | absent)
            totals += tl.where(kept, x, 0.0)
            counts += kept.to(tl.int64)
            start += BLOCK
        total = tl.sum(totals, 0)
        count = tl.sum(counts, 0)

    top = tl.where(absent, 0.0, tl.where(total != total, total, top))
    divisor = tl.cast(pixels, acc)
    if not DIVIDE_BY_ALL:
        divisor = tl.where(absent | (top != top), divisor, tl.maximum(count, 1).to(acc))
    tl.store(pooled + plane, divide(total, divisor))
    tl.store(stats + 2 * plane, top)
    tl.store(stats + 2 * plane + 1, divisor)


@triton.jit(do_not_specialize=["channels", "grad_stride_n", "grad_stride_c"])
def _pool_backward(grad, maps, present, stats, grad_maps, pixels: tl.int64, channels, grad_stride_n, grad_stride_c,
                   tau: tl.float64, STRICT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    acc: tl.constexpr = stats.dtype.element_ty
    chunks = tl.cdiv(pixels, BLOCK)
    plane = tl.program_id(0) // chunks
    offset = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < pixels
    absent = tl.load(present + plane) == 0
    top = tl.load(stats + 2 * plane)
    divisor = tl.load(stats + 2 * plane + 1)
    n, c = plane // channels, plane % channels
    share = divide(tl.load(grad + n * grad_stride_n + c * grad_stride_c).to(acc), divisor)
    x = tl.load(maps + plane * pixels + offset, mask=mask, other=0).to(acc)
    kept = _kept(x, top, tl.full([], tau, acc), STRICT) | (absent | (top != top))
    grad_x = tl.where(kept, share, 0.0)
    tl.store(grad_maps + plane * pixels + offset, grad_x.to(grad_maps.dtype.element_ty), mask=mask)


def _check_gndrp(op: str, maps: Tensor, present: Tensor) -> None:
    shape = tuple(maps.shape)
    check_floats(op, "maps", maps)
    check(len(shape) == 4 and 0 not in shape[2:], ValueError, op, "maps (N, C, H, W) with H, W >= 1", shape)
    check(present.dtype == torch.bool, TypeError, op, "present in bool", present.dtype)
    check(present.shape == shape[:2], ValueError, op, f"present {shape[:2]}, the maps' (N, C)", tuple(present.shape))
    check_same_device(op, maps, present)


def gndrp(maps: Tensor, present: Tensor, tau: float, divide_by_all: bool, strict: bool) -> tuple[Tensor, Tensor]:
    _check_gndrp("gndrp", maps, present)
    maps, present = maps.contiguous(), present.contiguous()
    n, channels, height, width = maps.shape
    pooled = torch.empty((n, channels), dtype=accumulator(maps.dtype), device=maps.device)
    stats = pooled.new_empty((n, channels, 2))
    if n * channels == 0:
        return pooled, stats
    pixels = height * width
    whole = pixels <= WHOLE_MAP
    block = triton.next_power_of_2(pixels) if whole else CHUNK
    with torch.cuda.device_of(maps):
        _pool[(n * channels,)](
            maps, present, pooled, stats, pixels, tau, divide_by_all, strict, whole, block,
            num_warps=min(max(block // 256, 1), 16),
        )  # fmt: skip
    return pooled, stats


def gndrp_backward(grad: Tensor, maps: Tensor, present: Tensor, stats: Tensor, tau: float, strict: bool) -> Tensor:
    op = "gndrp_backward"
    _check_gndrp(op, maps, present)
    check_floats(op, "grad", grad)
    check(grad.shape == present.shape, ValueError, op, f"grad {tuple(present.shape)}", tuple(grad.shape))
    check(stats.shape == (*present.shape, 2) and stats.dtype == accumulator(maps.dtype), ValueError, op,
          "the stats that gndrp returned", f"{tuple(stats.shape)} in {stats.dtype}")  # fmt: skip
    check_same_device(op, maps, grad, stats)
    maps, present, stats = maps.contiguous(), present.contiguous(), stats.contiguous()
    n, channels, height, width = maps.shape
    grad_maps = torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)
    if n * channels == 0:
        return grad_maps
    pixels = height * width
    block = min(triton.next_power_of_2(pixels), 1024)
    with torch.cuda.device_of(maps):
        _pool_backward[(n * channels * triton.cdiv(pixels, block),)](
            grad, maps, present, stats, grad_maps, pixels, channels, grad.stride(0), grad.stride(1), tau, strict, block,
            num_warps=min(max(block // 256, 1), 4),
        )  # fmt: skip
    return grad_maps
