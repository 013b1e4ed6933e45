"""From the maps of an image's scales to the two CAMs that the pipelines keep."""

import torch
from torch import Tensor

from . import ops


def merge_cams(maps: list[Tensor], keys: list[int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(cam, high_res) of the present classes `keys`, each map divided by its maximum.

    maps: for each scale (V, C, h, w), V = 2 being the image's and the mirrored image's logits or rectified maps,
    V = 1 their sum. cam: (keys, ceil(H / 4), ceil(W / 4)); high_res: (keys, H, W), enlarged to multiples of 16, cut.
    """
    height, width = size
    chosen = [m[:, torch.as_tensor(keys, device=m.device)] for m in maps]
    small = (-(-height // 4), -(-width // 4))
    cam = ops.accumulate_cams(chosen, small)
    high_res = ops.accumulate_cams(chosen, size, padded=(-(-height // 16) * 16, -(-width // 16) * 16))
    return ops.normalize_cams(cam, inplace=True), ops.normalize_cams(high_res, inplace=True)
