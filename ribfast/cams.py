"""From the logits maps of an image's scales, or of the crops of its scales, to its class activation maps."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import data, ops


def merge_cams(
    maps: Sequence[Tensor], keys, size: tuple[int, int], reduced: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """The CAMs of the classes `keys` at a quarter of the image's size and at its size, each divided by its maximum.

    maps: for each scale (2, C, h, w), of the image and of its mirror, or (1, C, h, w) of the image alone; rectified
    here. size: the image's (H, W). Returns (n, ceil(H / 4), ceil(W / 4)) and (n, H, W), as IRN's files hold them: the
    larger ones are enlarged to multiples of 16, then cut. reduced: (h, w), where the image was reduced to that before
    its scales were made; the multiples are then of its sides.
    """
    keys = keys.tolist() if isinstance(keys, Tensor) else list(keys)
    chosen = [scale[:, keys] for scale in maps]  # before merging: the cost is the number of classes
    padded = tuple(-(-side // 16) * 16 for side in reduced or size)
    if reduced is not None:
        shares = zip(padded, size, reduced, strict=True)
        padded = tuple(max(own, round(side * own / less)) for side, own, less in shares)
    high_res = ops.accumulate_cams(chosen, size, padded=padded)
    return strided_cams(chosen, size), ops.normalize_cams(high_res, inplace=True)


def strided_cams(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """The first of merge_cams's alone, of maps that hold the classes wanted and no others."""
    strided = ops.accumulate_cams(list(maps), (-(-size[0] // 4), -(-size[1] // 4)))
    return ops.normalize_cams(strided, inplace=True)


def shrink_cams(high_res: Tensor) -> Tensor:
    """Maps (n, H, W) -> (n, ceil(H / 4), ceil(W / 4)): the mean of each 4 x 4 pixels, of those that there are."""
    return F.avg_pool2d(high_res, 4, ceil_mode=True)


CROP_SCALES = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)


def multi_crop_cams(
    model,
    image: np.ndarray,
    classes: Sequence[int],
    *,
    scales: Sequence[float] = CROP_SCALES,
    crop: int = 448,
    stride: int = 300,
    batch: int = 16,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """PMM's CAMs (n, H, W) in [0, 1] of `classes`: the image's scales in overlapping crops, all of one size.

    model: a models.CamClassifier; image: (H, W, 3) uint8 RGB. Rectified maps are averaged where a scale's crops overlap
    and summed over scales at the image's size; each class is then stretched from its minimum to its maximum (a constant
    map becomes 0). A scale that is smaller than a crop is padded with zeros at the bottom and right, after it has been
    normalised. PMM names scales from 0.75 to 3; those between are this project's choice. batch: crops at a time. The
    model's device and the caller's autocast apply. size: (H, W) of the maps; None: the image's.
    """
    op, keys = "multi_crop_cams", [int(key) for key in classes]
    if not 0 < stride <= crop:
        raise ValueError(f"{op}: expected 0 < stride <= crop, got stride {stride} and crop {crop}")
    if batch < 1:
        raise ValueError(f"{op}: expected a batch of at least 1, got {batch}")
    if any(not 0 <= key < model.n_classes for key in keys):
        raise ValueError(f"{op}: expected classes from 0 to {model.n_classes - 1}, got {keys}")
    if not scales:
        raise ValueError(f"{op}: expected at least one scale, got none")
    device = next(model.parameters()).device
    size = size or image.shape[:2]
    sums = torch.zeros(len(keys), *size, device=device)
    if not keys:
        return sums
    views = data.make_views(image, scales, data.NORMALIZATIONS[model.normalization], mirror=False)
    grids = [tuple(crop_origins(side, crop, stride) for side in view.shape[2:]) for view in views]
    places = [
        (view[0], y, x) for view, (rows, columns) in zip(views, grids, strict=True) for y in rows for x in columns
    ]
    maps = []
    with torch.inference_mode():
        for first in range(0, len(places), batch):
            some = places[first : first + batch]
            maps.append(model(cut_crops(some, crop).to(device, non_blocking=True))[:, keys].float())
        maps = torch.cat(maps)
        for view, (rows, columns) in zip(views, grids, strict=True):
            own, maps = maps.split([len(rows) * len(columns), len(maps) - len(rows) * len(columns)])
            merge_crops(own, rows, columns, crop, view.shape[2:], sums)
        low, high = sums.amin((1, 2), keepdim=True), sums.amax((1, 2), keepdim=True)
        spread = torch.where(high - low > 1e-5 * high, high - low, torch.inf)  # rounding is no pattern
        sums.sub_(low).div_(spread)
    return sums


def cut_crops(places: Sequence[tuple[Tensor, int, int]], crop: int) -> Tensor:
    """(n, 3, crop, crop) of views (3, h, w), from row y and column x on, with zeros beyond the view."""
    crops = places[0][0].new_zeros(len(places), 3, crop, crop).contiguous(memory_format=torch.channels_last)
    for out, (view, y, x) in zip(crops, places, strict=True):
        part = view[:, y : y + crop, x : x + crop]
        out[:, : part.shape[1], : part.shape[2]] = part
    return crops


def crop_origins(length: int, crop: int, stride: int) -> list[int]:
    """Where crops begin along a side: every `stride`, the last one where it ends with the side; 0 on a short side."""
    last = max(0, length - crop)
    return [*range(0, last, stride), last]


def merge_crops(
    maps: Tensor,
    rows: Sequence[int],
    columns: Sequence[int],
    crop: int,
    plane: tuple[int, int],
    out: Tensor,
    *,
    relu: bool = True,
) -> Tensor:
    """Adds the class maps of one scale's crops to `out` (C, H, W), at the image's size, and returns it.

    maps: (len(rows) * len(columns), C, h, w), row by row, of crops (crop, crop) that begin at rows and columns and
    cover the scale's plane (h', w'); rectified here unless relu is False. Each is enlarged (bilinear,
    align_corners=False) to its crop, the mean is taken of all that cover a pixel of the plane, and the plane is resized
    likewise to the size of `out`.

    Crops that begin on a grid make all of this one linear map of rows and one of columns: with the crops' maps side by
    side, out += R maps C', two matrix products, and nothing of the plane's size is ever in memory.
    """
    _, channels, height, width = maps.shape
    like = dict(dtype=out.dtype, device=out.device)
    down = _along_a_side(rows, crop, height, plane[0], out.shape[1], like)
    across = _along_a_side(columns, crop, width, plane[1], out.shape[2], like)
    grid = (maps.relu() if relu else maps).to(out.dtype).view(len(rows), len(columns), channels, height, width)
    side_by_side = grid.permute(2, 0, 3, 1, 4).reshape(channels, len(rows) * height, len(columns) * width)
    with torch.autocast(out.device.type, enabled=False):
        return out.baddbmm_(down.T.expand(channels, -1, -1), side_by_side @ across)


def _along_a_side(origins, crop: int, cells: int, length: int, size: int, like: dict) -> Tensor:
    """(crops * cells, size): the weight of each crop's cells in each position of the result."""
    enlarged = F.interpolate(torch.eye(cells, **like)[None], crop, mode="linear")[0]
    weights, cover = torch.zeros(len(origins), cells, length, **like), torch.zeros(length, **like)
    for own, begin in zip(weights, origins, strict=True):
        end = min(begin + crop, length)
        own[:, begin:end] = enlarged[:, : end - begin]
        cover[begin:end] += 1
    return F.interpolate((weights / cover).flatten(0, 1)[None], size, mode="linear")[0]


def enlarge_cams(cam: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps at a quarter of the size (n, ceil(H / 4), ceil(W / 4)) -> (n, H, W): bilinear, align_corners=False, cut."""
    if not len(cam):
        return cam.new_zeros((0, *size), dtype=torch.float32)
    padded = 4 * cam.shape[1], 4 * cam.shape[2]
    return ops.accumulate_cams([cam[None]], size, padded=padded, relu=False)
