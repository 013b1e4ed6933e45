"""The fully connected CRF's mean field: wrapper, contract, fake kernel; no gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ext, reference
from . import contract
from .registration import refuse_gradient, run_as_is_under_autocast

_OP = "dense_crf"
NORMALIZATIONS = ("symmetric", "after", "before", "none")


def dense_crf(
    images: Tensor | Sequence[Tensor],
    unary: Tensor | Sequence[Tensor],
    *,
    gaussian: tuple[float, float] | None = (3.0, 3.0),
    bilateral: tuple[float, float, float] | None = (50.0, 5.0, 10.0),
    iterations: int = 10,
    normalization: str = "symmetric",
    exact: bool = False,
    nan: str = "error",
) -> Tensor | list[Tensor]:
    """Probabilities of the labels of every pixel: mean field in a CRF that connects all pixels of an image.

    images: (N, H, W, 3) uint8, unary: (N, L, H, W) energies (-log p) -> (N, L, H, W) float32; or lists of (H, W, 3) and
    (L, H, W), of different sizes and numbers of labels if need be -> a list.
    gaussian: (standard deviation in pixels, strength), bilateral: (in pixels, in colour, strength) of the Potts terms;
    None leaves a term out. normalization: "symmetric" (pydensecrf's default), "after", "before" or "none".
    exact: pydensecrf's order of operations, for results equal to 1e-5; otherwise they are within 5e-4 of it.
    nan: "error" refuses energies that are not finite; "propagate" computes with them.
    """
    stacked = isinstance(images, Tensor)
    if stacked != isinstance(unary, Tensor):
        raise TypeError(f"{_OP}: expected images and unary to be two tensors or two lists, "
                        f"got {type(images).__name__} and {type(unary).__name__}")  # fmt: skip
    if stacked and (images.ndim != 4 or unary.ndim != 4):
        raise ValueError(f"{_OP}: expected images (N, H, W, 3) and unary (N, L, H, W), got shapes "
                         f"{tuple(images.shape)} and {tuple(unary.shape)}")  # fmt: skip
    each_image, each_unary = list(images), list(unary)
    if len(each_image) != len(each_unary):
        raise ValueError(f"{_OP}: expected a unary for each image, got {len(each_unary)} for {len(each_image)}")
    if nan not in ("error", "propagate"):
        raise ValueError(f"{_OP}: expected nan to be 'error' or 'propagate', got {nan!r}")
    for image, energies in zip(each_image, each_unary, strict=True):
        _check_pair(image, energies, nan)
    terms = [_term("gaussian", gaussian, 2), _term("bilateral", bilateral, 3)]
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"{_OP}: expected iterations to be an integer, got {type(iterations).__name__}")
    if iterations < 0:
        raise ValueError(f"{_OP}: expected iterations of at least 0, got {iterations}")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"{_OP}: expected normalization to be one of {', '.join(NORMALIZATIONS)}, "
                         f"got {normalization!r}")  # fmt: skip
    if not each_image:
        return torch.empty(unary.shape, device=unary.device) if stacked else []
    contract.same_device(_OP, *each_image, *each_unary)
    if _ext.backend(_OP, each_image[0].device).name == "reference":
        options = dict(gaussian=gaussian, bilateral=bilateral, iterations=iterations, normalization=normalization)
        results = [reference.dense_crf(i, u, **options) for i, u in zip(each_image, each_unary, strict=True)]
    else:
        how = NORMALIZATIONS.index(normalization)
        results = torch.ops.ribfast.dense_crf(each_image, each_unary, *terms, iterations, how, bool(exact), 0)
    return torch.stack(results) if stacked else results


def _check_pair(image, energies, nan: str) -> None:
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        got = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"{_OP}: expected images to be uint8 tensors (H, W, 3), got {got}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"{_OP}: expected images (H, W, 3) with at least one pixel, got shape {tuple(image.shape)}")
    contract.tensor(_OP, "unary", energies, 3, "(L, H, W)")
    if energies.shape[0] == 0 or energies.shape[1:] != image.shape[:2]:
        raise ValueError(f"{_OP}: expected unary (L, H, W) with L >= 1 and the image's size {tuple(image.shape[:2])}, "
                         f"got shape {tuple(energies.shape)}")  # fmt: skip
    # a finite sum is the quick proof
    if nan == "error" and not torch.isfinite(energies.sum()) and not torch.isfinite(energies).all():
        raise ValueError(f"{_OP}: expected finite energies, got NaN or infinity; clip probabilities before taking "
                         "their logarithm, or pass nan='propagate'")  # fmt: skip


def _term(name: str, term, count: int) -> list[float]:
    """A pairwise term as the operator takes it: empty for None."""
    if term is None:
        return []
    try:
        numbers = [contract.number(_OP, name, number) for number in term]
    except TypeError:
        raise TypeError(f"{_OP}: expected {name} to be {count} numbers or None, got {term!r}") from None
    if len(numbers) != count:
        raise ValueError(f"{_OP}: expected {name} to be {count} numbers or None, got {term!r}")
    if min(numbers[:-1]) <= 0:
        raise ValueError(f"{_OP}: expected {name} with standard deviations above 0, got {term!r}")
    return numbers


@torch.library.register_fake("ribfast::dense_crf")
def _(images, unary, gaussian, bilateral, iterations, normalization, exact, capacity):
    return [energies.new_empty(energies.shape, dtype=torch.float32) for energies in unary]


refuse_gradient("dense_crf", "detach() it")
run_as_is_under_autocast("dense_crf")
