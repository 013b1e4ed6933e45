"""M = sum over scales of upsample(ReLU(T(x)) + flip(ReLU(T(flip x)))), cut to the image's size.

Layout: maps, the scales of all images in a row, counts[i] of them for image i, each (V, C, h, w) with V in {1, 2}, of
any strides, copied if not contiguous or not aligned to 16 bytes; sizes and padded: H, W of each image. The sums are
(C, H, W), contiguous, in float32 (float64 for float64 maps). In place they are added to `out`, of whatever strides.
Gradients have the maps' shapes and dtype, contiguous. C = 0 and no images launch nothing.

Up to MOST_IMAGES images of any shapes but one number of scales share a launch; above MOST_SCALES scales the rest is
added by another. The backward is one launch for each map, and gathers: its sums have one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gndrp import accumulator, check, check_floats, check_same_device, divide

MOST_SCALES = 8
MOST_IMAGES = 8


@triton.jit
def _pick(values, image, SCALE: tl.constexpr, SCALES: tl.constexpr, IMAGES: tl.constexpr):
    """values[image * SCALES + SCALE]: a tuple knows no index that is not constant."""
    value = values[SCALE]
    for i in tl.static_range(1, IMAGES):
        value = tl.where(image == i, values[i * SCALES + SCALE], value)
    return value


@triton.jit
def _pick_number(numbers, image, SCALE: tl.constexpr, SCALES: tl.constexpr, IMAGES: tl.constexpr):
    return _pick(numbers, image, SCALE, SCALES, IMAGES) >> 1


@triton.jit
def _tap(position, size, padded, ACC: tl.constexpr):
    """The two cells that an output position reads, and the second one's weight: torch's align_corners=False."""
    step = divide(tl.cast(size, ACC), tl.cast(padded, ACC))
    source = step * (position.to(ACC) + 0.5) - 0.5
    source = tl.where(source < 0, 0.0, source)
    cell = tl.minimum(source.to(tl.int32), size - 1)
    t = source - cell.to(ACC)
    return cell, tl.minimum(cell + 1, size - 1), tl.where(t < 1, t, 1.0)


@triton.jit
def _read(pointers, mask, RELU: tl.constexpr, ACC: tl.constexpr):
    x = tl.load(pointers, mask=mask, other=0).to(ACC)
    if RELU:
        x = tl.where(x < 0, 0.0, x)  # NaN stays
    return x


@triton.jit
def _merged(view, mirror, row, column, width, mirror_width, mask, RELU: tl.constexpr,
            ACC: tl.constexpr):  # fmt: skip
    """The map plus the mirrored image's map turned back, at (row, column); mirror_width is 0 if there is none."""
    row = row.to(tl.int64) * width
    x = _read(view + row + column, mask, RELU, ACC)
    return x + _read(mirror + row + (width - 1 - column), mask & (column < mirror_width), RELU, ACC)


@triton.jit
def _accumulate(outs, channels, heights, widths, padded_heights, padded_widths, maps, views, map_heights, map_widths,
                RELU: tl.constexpr, ADD: tl.constexpr, SCALES: tl.constexpr, IMAGES: tl.constexpr,
                BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    image = tl.program_id(1)
    classes = _pick_number(channels, image, 0, 1, IMAGES)
    height = _pick_number(heights, image, 0, 1, IMAGES)
    width = _pick_number(widths, image, 0, 1, IMAGES)
    tiles_w = tl.cdiv(width, BLOCK_W)
    tiles = tl.cdiv(height, BLOCK_H) * tiles_w
    channel = tl.program_id(0) // tiles
    if channel >= classes:
        return
    tile = tl.program_id(0) % tiles
    padded_height = _pick_number(padded_heights, image, 0, 1, IMAGES)
    padded_width = _pick_number(padded_widths, image, 0, 1, IMAGES)
    out = _pick(outs, image, 0, 1, IMAGES)
    acc: tl.constexpr = out.dtype.element_ty

    top = (tile // tiles_w) * BLOCK_H
    y = top + tl.arange(0, BLOCK_H)
    x = (tile % tiles_w) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = (y < height)[:, None] & (x < width)[None, :]
    total = tl.zeros([BLOCK_H, BLOCK_W], acc)
    for s in tl.static_range(SCALES):
        h = _pick_number(map_heights, image, s, SCALES, IMAGES)
        w = _pick_number(map_widths, image, s, SCALES, IMAGES)
        plane = h.to(tl.int64) * w
        view = _pick(maps, image, s, SCALES, IMAGES) + channel * plane
        mirror = view + classes * plane
        mirror_w = tl.where(_pick_number(views, image, s, SCALES, IMAGES) == 2, w, 0)
        row, next_row, ty = _tap(y, h, padded_height, acc)
        column, next_column, tx = _tap(x, w, padded_width, acc)
        row, next_row, ty = row[:, None], next_row[:, None], ty[:, None]
        column, next_column, tx = column[None, :], next_column[None, :], tx[None, :]
        upper = (1 - tx) * _merged(view, mirror, row, column, w, mirror_w, mask, RELU, acc)
        upper += tx * _merged(view, mirror, row, next_column, w, mirror_w, mask, RELU, acc)
        lower = (1 - tx) * _merged(view, mirror, next_row, column, w, mirror_w, mask, RELU, acc)
        lower += tx * _merged(view, mirror, next_row, next_column, w, mirror_w, mask, RELU, acc)
        total += (1 - ty) * upper + ty * lower

    first = (channel.to(tl.int64) * height + top) * width
    target = out + first + (tl.arange(0, BLOCK_H)[:, None] * width + x[None, :])
    if ADD:
        total = tl.load(target, mask=mask, other=0) + total
    tl.store(target, total, mask=mask)


@triton.jit
def _readers(cell, size, padded, extent):
    """The output positions [first, last) below `extent` whose source lies strictly between cells cell - 1, cell + 1.

    In integers: source > cell - 1 is size * (2 * position + 1) > padded * (2 * cell - 1).
    """
    cell, twice = cell.to(tl.int64), 2 * size.to(tl.int64)
    low = padded * (2 * cell - 1) - size
    first = tl.where(low < 0, 0, low // twice + 1)
    last = (padded * (2 * cell + 3) + size - 1) // twice
    return first.to(tl.int32), tl.minimum(last, extent).to(tl.int32)


@triton.jit
def _weight(position, cell, size, padded, ACC: tl.constexpr):
    """What `position` takes of `cell`; at the far edge both taps are one cell."""
    near, far, t = _tap(position, size, padded, ACC)
    return tl.where(near == cell, 1 - t, 0.0) + tl.where(far == cell, t, 0.0)


@triton.jit(do_not_specialize=["channels", "height", "width", "padded_height", "padded_width", "views", "h", "w"])
def _accumulate_backward(grad, maps, grad_maps, channels, height, width, padded_height, padded_width, views, h, w,
                         RELU: tl.constexpr, BLOCK_CELLS: tl.constexpr, BLOCK_X: tl.constexpr):  # fmt: skip
    acc: tl.constexpr = grad.dtype.element_ty
    tiles = tl.cdiv(w, BLOCK_CELLS)
    i = (tl.program_id(0) // tiles) % h
    channel = (tl.program_id(0) // tiles // h).to(tl.int64)
    j = (tl.program_id(0) % tiles) * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    first_y, last_y = _readers(i, h, padded_height, height)
    first_x, last_x = _readers(j, w, padded_width, width)
    last_x = tl.where(j < w, last_x, 0)
    grad += channel * height * width
    total = tl.zeros([BLOCK_CELLS], acc)
    widest = tl.max(last_x - first_x, 0)
    start = 0
    while start < widest:
        x = first_x[:, None] + start + tl.arange(0, BLOCK_X)[None, :]
        mask = x < last_x[:, None]
        columns = tl.zeros([BLOCK_CELLS, BLOCK_X], acc)
        y = first_y
        while y < last_y:
            row = tl.load(grad + y.to(tl.int64) * width + x, mask=mask, other=0)
            columns += _weight(y, i, h, padded_height, acc) * row
            y += 1
        total += tl.sum(columns * _weight(x, j[:, None], w, padded_width, acc), 1)
        start += BLOCK_X

    row = (channel * h + i) * w
    for v in tl.static_range(2):
        cell = row + (j if v == 0 else w - 1 - j)
        mask = j < tl.where(v < views, w, 0)
        value = total
        if RELU:
            value = tl.where(tl.load(maps + cell, mask=mask, other=0).to(acc) <= 0, 0.0, value)
        tl.store(grad_maps + cell, value.to(grad_maps.dtype.element_ty), mask=mask)
        row += channels.to(tl.int64) * h * w


def _images(op: str, maps: list[Tensor], counts: list[int], sizes: list[int], padded: list[int]) -> list[list[Tensor]]:
    """The scales of each image, checked, contiguous."""
    check(len(sizes) == len(padded) == 2 * len(counts), ValueError, op, "an (H, W) in sizes and padded for each image",
          f"{len(sizes)} and {len(padded)} numbers for {len(counts)} images")  # fmt: skip
    check(sum(counts) == len(maps) and min(counts, default=1) > 0, ValueError, op,
          "counts that add up to the number of maps", f"counts {counts} for {len(maps)} maps")  # fmt: skip
    check(all(1 <= size <= large < 2**24 for size, large in zip(sizes, padded, strict=True)), ValueError, op,
          "1 <= size <= padded < 2^24", f"sizes {sizes} and padded {padded}")  # fmt: skip
    for scale in maps:
        shape = tuple(scale.shape)
        check_floats(op, "maps", scale)
        check(scale.dtype == maps[0].dtype, TypeError, op, "maps of one dtype", f"{scale.dtype} and {maps[0].dtype}")
        check(len(shape) == 4 and shape[0] in (1, 2) and all(1 <= side < 2**24 for side in shape[2:]), ValueError, op,
              "maps (V, C, h, w) with V 1 or 2 and h, w >= 1", shape)  # fmt: skip
        check_same_device(op, maps[0], scale)
    remaining = iter(maps)
    images = [[next(remaining).contiguous() for _ in range(count)] for count in counts]
    for scales in images:
        classes = {scale.shape[1] for scale in scales}
        check(len(classes) == 1, ValueError, op, "the same classes at every scale", sorted(classes))
    return images


def _check_targets(op: str, targets: list[Tensor], images: list[list[Tensor]], sizes: list[int]) -> None:
    check(len(targets) == len(images), ValueError, op, "one (C, H, W) tensor for each image",
          f"{len(targets)} for {len(images)} images")  # fmt: skip
    for target, (first, *_), height, width in zip(targets, images, sizes[::2], sizes[1::2], strict=True):
        shape, dtype = (first.shape[1], height, width), accumulator(first.dtype)
        check(target.shape == shape, ValueError, op, f"a tensor of shape {shape}", tuple(target.shape))
        check(target.dtype == dtype, TypeError, op, f"{dtype} for such maps", target.dtype)
        check_same_device(op, first, target)


def _sizes(op: str, targets: list[Tensor]) -> list[int]:
    for target in targets:
        check(target.ndim == 3, ValueError, op, "a tensor (C, H, W) for each image", tuple(target.shape))
    return [side for target in targets for side in target.shape[1:]]


def _numbers(values) -> tuple[int, ...]:
    """As 2n + 1, which is neither 1 nor a multiple of 16: in tuples Triton would compile anew for each of those."""
    return tuple(2 * value + 1 for value in values)


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0


def _accumulate_into(outs: list[Tensor], images: list[list[Tensor]], padded: list[int], relu: bool, add: bool) -> None:
    alike = {}  # what one compiled kernel serves: it knows the number of scales, and which pointers are aligned
    for out, scales, high, wide in zip(outs, images, padded[::2], padded[1::2], strict=True):
        if out.numel() > 0:
            scales = [scale if _is_aligned(scale) else scale.clone() for scale in scales]
            alike.setdefault((len(scales), _is_aligned(out)), []).append((out, scales, high, wide))
    for (count, _), jobs in alike.items():
        for start in range(0, len(jobs), MOST_IMAGES):
            for scale in range(0, count, MOST_SCALES):
                _launch(jobs[start : start + MOST_IMAGES], slice(scale, scale + MOST_SCALES), relu, add or scale > 0)


def _launch(jobs: list[tuple], part: slice, relu: bool, add: bool) -> None:
    """The scales `part` of some images."""
    images = triton.next_power_of_2(len(jobs))  # few kernels to compile: the last image stands in, and is not run
    outs, scales, padded_heights, padded_widths = zip(*(jobs + jobs[-1:] * (images - len(jobs))), strict=True)
    channels, heights, widths = zip(*(out.shape for out in outs), strict=True)
    maps = tuple(scale for image in scales for scale in image[part])
    views, _, map_heights, map_widths = zip(*(scale.shape for scale in maps), strict=True)
    block_w = min(triton.next_power_of_2(max(widths)), 128)
    block_h = min(triton.next_power_of_2(max(heights)), 512 // block_w)
    programs = max(
        c * triton.cdiv(height, block_h) * triton.cdiv(width, block_w)
        for c, height, width in zip(channels, heights, widths, strict=True)
    )
    with torch.cuda.device_of(outs[0]):
        _accumulate[(programs, len(jobs))](
            outs, _numbers(channels), _numbers(heights), _numbers(widths), _numbers(padded_heights),
            _numbers(padded_widths), maps, _numbers(views), _numbers(map_heights), _numbers(map_widths),
            relu, add, len(maps) // images, images, block_h, block_w,
        )  # fmt: skip


def accumulate_cams(
    maps: list[Tensor], counts: list[int], sizes: list[int], padded: list[int], relu: bool
) -> list[Tensor]:
    images = _images("accumulate_cams", maps, counts, sizes, padded)
    outs = [
        first.new_empty((first.shape[1], height, width), dtype=accumulator(first.dtype))
        for (first, *_), height, width in zip(images, sizes[::2], sizes[1::2], strict=True)
    ]
    _accumulate_into(outs, images, padded, relu, add=False)
    return outs


def accumulate_cams_(out: list[Tensor], maps: list[Tensor], counts: list[int], padded: list[int], relu: bool) -> None:
    op = "accumulate_cams"
    sizes = _sizes(op, out)
    images = _images(op, maps, counts, sizes, padded)
    _check_targets(op, out, images, sizes)
    dense = [target.contiguous() for target in out]
    _accumulate_into(dense, images, padded, relu, add=True)
    for target, total in zip(out, dense, strict=True):
        if total is not target:
            target.copy_(total)


def accumulate_cams_backward(
    grads: list[Tensor], maps: list[Tensor], counts: list[int], padded: list[int], relu: bool
) -> list[Tensor]:
    op = "accumulate_cams_backward"
    sizes = _sizes(op, grads)
    images = _images(op, maps, counts, sizes, padded)
    _check_targets(op, grads, images, sizes)
    grad_maps = []
    for grad, scales, padded_height, padded_width in zip(grads, images, padded[::2], padded[1::2], strict=True):
        grad = grad.contiguous()
        channels, height, width = grad.shape
        for scale in scales:
            views, _, h, w = scale.shape
            grad_map = torch.empty(scale.shape, dtype=scale.dtype, device=scale.device)
            grad_maps.append(grad_map)
            if grad_map.numel() == 0:
                continue
            block_x = min(triton.next_power_of_2(triton.cdiv(2 * padded_width, w)), 64)
            block_cells = min(triton.next_power_of_2(w), 1024 // block_x)
            with torch.cuda.device_of(scale):
                _accumulate_backward[(channels * h * triton.cdiv(w, block_cells),)](
                    grad, scale, grad_map, channels, height, width, padded_height, padded_width, views, h, w,
                    relu, block_cells, block_x,
                )  # fmt: skip
    return grad_maps
