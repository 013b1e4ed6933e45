"""cam / (max cam + eps), each (H, W) map by its own maximum.

Layout: cams (..., H, W) of any strides, copied if not contiguous; the result has their shape and dtype, contiguous.
In place the result replaces cams, of whatever strides. Arithmetic is in float32 (float64 for float64 maps). No maps:
nothing is launched. A map of up to WHOLE_MAP pixels is one program and read once; larger ones are shared by programs
and read twice, in two launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gndrp import accumulator, check, check_floats, divide

WHOLE_MAP = 16384  # the largest map that a program holds in registers
PART = 4096  # pixels of a larger one to each program, where that makes no more than MOST_PARTS
MOST_PARTS = 256
BLOCK = 1024


@triton.jit
def _maximum(x):
    """The maximum, or NaN if there is one: tl.max alone passes over it."""
    return tl.max(x, 0) + tl.sum(tl.where(x != x, x, 0.0), 0)


@triton.jit
def _normalize(cams, out, pixels: tl.int64, eps: tl.float64, ACC: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    offset = tl.program_id(0) * pixels + lane
    mask = lane < pixels
    x = tl.load(cams + offset, mask=mask, other=-float("inf")).to(ACC)
    result = divide(x, _maximum(x) + tl.full([], eps, ACC))
    tl.store(out + offset, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _part_maxima(cams, maxima, pixels: tl.int64, part: tl.int64, parts, ACC: tl.constexpr, BLOCK: tl.constexpr):
    cams += (tl.program_id(0) // parts) * pixels
    start = (tl.program_id(0) % parts) * part
    end = tl.minimum(start + part, pixels)
    running = tl.full([BLOCK], -float("inf"), ACC)
    while start < end:
        offset = start + tl.arange(0, BLOCK)
        x = tl.load(cams + offset, mask=offset < end, other=-float("inf")).to(ACC)
        running = tl.where((x > running) | (x != x), x, running)  # no x is greater than a NaN: it stays
        start += BLOCK
    tl.store(maxima + tl.program_id(0), _maximum(running))


@triton.jit
def _normalize_by(cams, maxima, out, pixels: tl.int64, parts, eps: tl.float64, ACC: tl.constexpr, PARTS: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    chunks = tl.cdiv(pixels, BLOCK)
    plane = tl.program_id(0) // chunks
    part = tl.arange(0, PARTS)
    top = _maximum(tl.load(maxima + plane * parts + part, mask=part < parts, other=-float("inf")))
    lane = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(cams + plane * pixels + lane, mask=lane < pixels, other=0).to(ACC)
    result = divide(x, top + tl.full([], eps, ACC))
    tl.store(out + plane * pixels + lane, result.to(out.dtype.element_ty), mask=lane < pixels)


def _check_cams(cams: Tensor) -> None:
    shape = tuple(cams.shape)
    check_floats("normalize_cams", "cams", cams)
    check(len(shape) >= 2 and 0 not in shape[-2:], ValueError, "normalize_cams", "cams (..., H, W) with H, W >= 1",
          shape)  # fmt: skip


def _launch(cams: Tensor, out: Tensor, eps: float) -> None:
    """Both contiguous; they may be one tensor."""
    if cams.numel() == 0:
        return
    pixels = cams.shape[-2] * cams.shape[-1]
    planes = cams.numel() // pixels
    acc = tl.float64 if cams.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(cams):
        if pixels <= WHOLE_MAP:
            block = triton.next_power_of_2(pixels)
            _normalize[(planes,)](cams, out, pixels, eps, acc, block, num_warps=min(max(block // 256, 1), 16))
            return
        parts = min(triton.cdiv(pixels, PART), MOST_PARTS)
        maxima = torch.empty(planes * parts, dtype=accumulator(cams.dtype), device=cams.device)
        _part_maxima[(planes * parts,)](cams, maxima, pixels, triton.cdiv(pixels, parts), parts, acc, BLOCK)
        _normalize_by[(planes * triton.cdiv(pixels, BLOCK),)](
            cams, maxima, out, pixels, parts, eps, acc, triton.next_power_of_2(parts), BLOCK
        )


def normalize_cams(cams: Tensor, eps: float) -> Tensor:
    _check_cams(cams)
    cams = cams.contiguous()
    out = torch.empty(cams.shape, dtype=cams.dtype, device=cams.device)
    _launch(cams, out, eps)
    return out


def normalize_cams_(cams: Tensor, eps: float) -> None:
    _check_cams(cams)
    if cams.is_contiguous():
        _launch(cams, cams, eps)
    else:
        cams.copy_(normalize_cams(cams, eps))
