"""From the logits maps of an image's scales to its class activation maps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops


def merge_cams(maps: Sequence[Tensor], keys, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The CAMs of the classes `keys` at a quarter of the image's size and at its size, each divided by its maximum.

    maps: for each scale (2, C, h, w), of the image and of its mirror, or (1, C, h, w) of the image alone; rectified
    here. size: the image's (H, W). Returns (n, ceil(H / 4), ceil(W / 4)) and (n, H, W), as IRN's files hold them: the
    larger ones are enlarged to multiples of 16, then cut.
    """
    keys = keys.tolist() if isinstance(keys, Tensor) else list(keys)
    chosen = [scale[:, keys] for scale in maps]  # before merging: the cost is the number of classes
    height, width = size
    padded = -(-height // 16) * 16, -(-width // 16) * 16
    strided = ops.accumulate_cams(chosen, (-(-height // 4), -(-width // 4)))
    high_res = ops.accumulate_cams(chosen, size, padded=padded)
    return ops.normalize_cams(strided, inplace=True), ops.normalize_cams(high_res, inplace=True)


def enlarge_cams(cam: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps at a quarter of the size (n, ceil(H / 4), ceil(W / 4)) -> (n, H, W): bilinear, align_corners=False, cut."""
    if not len(cam):
        return cam.new_zeros((0, *size), dtype=torch.float32)
    padded = 4 * cam.shape[1], 4 * cam.shape[2]
    return ops.accumulate_cams([cam[None]], size, padded=padded, relu=False)
