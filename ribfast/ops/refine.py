"""Refining class maps by local affinities of the image, PAR and PAMR: wrapper, contract, fake kernel; no gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ext, reference
from . import contract
from .registration import refuse_gradient, run_as_is_under_autocast

_OP = "refine"
MOST_DILATIONS = 16


def refine(
    images: Tensor | Sequence[Tensor],
    maps: Tensor | Sequence[Tensor],
    *,
    method: str = "par",
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    iterations: int = 10,
    w1: float = 0.3,
    w2: float = 0.01,
) -> Tensor | list[Tensor]:
    """Class maps that follow the edges of the image, in a fraction of a CRF's time: in every iteration each pixel takes
    the weighted sum of its neighbours' values (its own is not among them), weights by likeness of colour.

    images: (N, 3, H, W) in any float dtype or uint8, maps: (N, C, H, W) -> (N, C, H, W) float32; or lists of (3, H, W)
    and (C, H, W), of different sizes and numbers of classes if need be -> a list. Images are compared with their own
    local contrast: 0..255, 0..1 and normalised values all do (to an epsilon of 1e-8). Maps of another size than the
    images are refused: rescale one or the other.
    dilations: neighbours are the 8 around a pixel at each of these distances; beyond the border, the border's pixels.
    method: "par" (ToCo, AFA, WeCLIP): weights softmax(-mean over channels of (|I_k - I_0| / (s + 1e-8) / w1)^2), s the
    standard deviation of the neighbours, plus w2 times the same of their distances in space; they add up to 1 + w2, as
    released. "pamr" (Araslanov and Roth 2020): softmax(-mean of |I_k - I_0| / (1e-8 + 0.1 s)), s that of the neighbours
    and of the centre once for each dilation, as released; without w1 and w2.
    A NaN spreads as far as neighbours reach in `iterations` steps, and stays in its class if it was in a map.
    """
    stacked = contract.stacked(_OP, "images", images, "maps", maps)
    if stacked:
        pairs = [(images, maps)]
    else:
        pairs = list(zip(*contract.paired(_OP, "images", images, "maps", maps, "maps"), strict=True))
    for image, map_ in pairs:
        _check_pair(image, map_, stacked)
    if method not in ("par", "pamr"):
        raise ValueError(f"{_OP}: expected method to be 'par' or 'pamr', got {method!r}")
    if not isinstance(dilations, Sequence) or isinstance(dilations, str) or not 1 <= len(dilations) <= MOST_DILATIONS:
        raise ValueError(f"{_OP}: expected dilations to be 1 to {MOST_DILATIONS} integers, got {dilations!r}")
    dilations = [contract.integer(_OP, "dilations", d, 1, contract.LONGEST_SIDE) for d in dilations]
    iterations = contract.integer(_OP, "iterations", iterations, 0, 2**31 - 1)
    w1, w2 = contract.number(_OP, "w1", w1), contract.number(_OP, "w2", w2)
    if w1 <= 0:
        raise ValueError(f"{_OP}: expected w1 above 0, got {w1}")
    if not pairs:
        return []
    contract.same_device(_OP, *(t for pair in pairs for t in pair))
    if not stacked:
        pairs = [(image[None], map_[None]) for image, map_ in pairs]
    if _ext.backend(_OP, pairs[0][0].device).name == "reference":
        options = dict(method=method, dilations=dilations, iterations=iterations, w1=w1, w2=w2)
        results = [reference.refine(image, map_.float(), **options) for image, map_ in pairs]
    else:
        each_image, each_map = map(list, zip(*pairs, strict=True))
        results = torch.ops.ribfast.refine(each_image, each_map, method == "pamr", dilations, iterations, w1, w2)
    return results[0] if stacked else [result[0] for result in results]


def _check_pair(image, map_, stacked: bool) -> None:
    head, ndim = ("N, ", 4) if stacked else ("", 3)
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        contract.tensor(_OP, "images (unless uint8)", image, shape=f"({head}3, H, W)")
    contract.tensor(_OP, "maps", map_, ndim, f"({head}C, H, W)")
    contract.positions(_OP, "maps", map_)
    if max(map_.shape[-2:]) > contract.LONGEST_SIDE:
        raise ValueError(f"{_OP}: expected maps below 2^24 a side, got shape {tuple(map_.shape)}")
    expected = (*map_.shape[:-3], 3, *map_.shape[-2:])
    if tuple(image.shape) != expected:
        raise ValueError(f"{_OP}: expected images ({head}3, H, W) of the maps' shape, {expected}, "
                         f"got {tuple(image.shape)}; rescale one of them")  # fmt: skip


@torch.library.register_fake("ribfast::refine")
def _(images, maps, pamr, dilations, iterations, w1, w2):
    return [each.new_empty(each.shape, dtype=torch.float32) for each in maps]


refuse_gradient(_OP, "detach() it, or call ribfast.reference.refine")
run_as_is_under_autocast(_OP)
