"""Class maps at every threshold at once, as counts of pixels: wrapper, contract, fake kernel; no gradient."""

import torch
from torch import Tensor

from .. import _ext, reference
from . import contract
from .registration import refuse_gradient, run_as_is_under_autocast


def threshold_histogram(maps: Tensor, mask: Tensor, thresholds, n_labels: int, *, stride: int = 1) -> Tensor:
    """Count an image's pixels by true label, class of the largest map, and how many thresholds lie below that map.

    maps: (n, H, W), or (n, ceil(H / stride), ceil(W / stride)), which are enlarged `stride` times and cut as
    accumulate_cams does it, to the same bits; compared as float32. mask: (H, W) uint8 of labels below n_labels, and 255
    for pixels to leave out. thresholds: T ascending numbers. Returns (n_labels, n, T + 1) int64.
    At threshold i a pixel is of its class where more than i thresholds lie below it, else background: the argmax over
    the threshold and the maps, the first of equals. Maps that hold NaN are refused.
    """
    contract.tensor("threshold_histogram", "maps", maps, 3, "(n, H, W)")
    contract.labels("threshold_histogram", "mask", mask)
    contract.same_device("threshold_histogram", maps, mask)
    thresholds = torch.as_tensor(thresholds, dtype=torch.float32, device=maps.device)
    n_labels = contract.count("threshold_histogram", "n_labels", n_labels, most=255)
    stride = contract.count("threshold_histogram", "stride", stride, most=64)
    if thresholds.ndim != 1 or not len(thresholds):
        raise ValueError(f"threshold_histogram: expected a list of thresholds, got shape {tuple(thresholds.shape)}")
    expected = (len(maps), *(-(-side // stride) for side in mask.shape))
    if maps.shape != expected:
        raise ValueError(f"threshold_histogram: expected maps of shape {expected}, the mask's {tuple(mask.shape)} over "
                         f"the stride of {stride}, got {tuple(maps.shape)}")  # fmt: skip
    if _ext.backend("threshold_histogram", maps.device).name == "reference":
        return reference.threshold_histogram(maps, mask, thresholds, n_labels, stride=stride)
    return torch.ops.ribfast.threshold_histogram(maps, mask, thresholds, n_labels, stride)


@torch.library.register_fake("ribfast::threshold_histogram")
def _(maps, mask, thresholds, n_labels, stride):
    return maps.new_empty((n_labels, maps.shape[0], thresholds.shape[0] + 1), dtype=torch.int64)


refuse_gradient("threshold_histogram", "detach() it: counts have none")
run_as_is_under_autocast("threshold_histogram")
