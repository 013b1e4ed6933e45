"""The fully connected CRF's mean field: wrappers, contract, fake kernels; the gradient by a loop over the lattice's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ext, reference
from . import contract
from .lattice import Lattice
from .registration import refuse_gradient, run_as_is_under_autocast

_OP = "dense_crf"  # all three operators come from one backend
NORMALIZATIONS = reference.NORMALIZATIONS


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
    differentiable: bool = False,
    capacity: int | None = None,
) -> Tensor | list[Tensor]:
    """Probabilities of the labels of every pixel: mean field in a CRF that connects all pixels of an image.

    images: (N, H, W, 3) uint8, unary: (N, L, H, W) energies (-log p) -> (N, L, H, W) float32; or lists of (H, W, 3) and
    (L, H, W), of different sizes and numbers of labels if need be -> a list. Several problems of one image,
    (N, K, L, H, W) or lists of (K, L, H, W), share its lattices.
    gaussian: (standard deviation in pixels, strength), bilateral: (in pixels, in colour, strength) of the Potts terms;
    None leaves a term out. normalization: "symmetric" (pydensecrf's default), "after", "before" or "none".
    exact: pydensecrf's order of operations, for results equal to 1e-5; otherwise they are within 5e-4 of it.
    nan: "error" refuses energies that are not finite (but not while a CUDA graph is captured); "propagate" computes
    with them.
    differentiable: with respect to the unary, for a CRF as a layer: iterations by autograd over `Lattice.filter`, which
    keeps iterations * L * H * W floats an image; without it, asking for a gradient is an error.
    capacity: on CUDA devices, vertices for which a lattice has room (default: as many as there can be); fewer save
    memory, and more vertices than that are an error (in a CUDA graph, where nothing can be raised: NaN results).
    """
    stacked = isinstance(images, Tensor)
    each_image, each_unary = _paired(_OP, images, unary, "unary", "(N, L, H, W) or (N, K, L, H, W)", 4, 5)
    if nan not in ("error", "propagate"):
        raise ValueError(f"{_OP}: expected nan to be 'error' or 'propagate', got {nan!r}")
    for image, energies in zip(each_image, each_unary, strict=True):
        _check_image(_OP, image)
        _check_unary(image, energies, nan)
    options = _options(_OP, gaussian, bilateral, iterations, normalization, exact, capacity)
    _check_choice(_OP, exact, differentiable)
    if not each_image:
        return torch.empty(unary.shape, device=unary.device) if stacked else []
    contract.same_device(_OP, *each_image, *each_unary)
    if differentiable:
        results = [_by_autograd(i, u, gaussian, bilateral, iterations, normalization)
                   for i, u in zip(each_image, each_unary, strict=True)]  # fmt: skip
    elif _ext.backend(_OP, each_image[0].device).name == "reference":
        terms = dict(gaussian=gaussian, bilateral=bilateral, iterations=iterations, normalization=normalization)
        results = [reference.dense_crf(i, u, **terms) for i, u in zip(each_image, each_unary, strict=True)]
    else:
        results = torch.ops.ribfast.dense_crf(each_image, each_unary, *options)
    return torch.stack(results) if stacked else results


def dense_crf_labels(
    images: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    n_labels: int,
    *,
    confidence: float = 0.7,
    unsure: int | None = None,
    gaussian: tuple[float, float] | None = (3.0, 3.0),
    bilateral: tuple[float, float, float] | None = (50.0, 5.0, 10.0),
    iterations: int = 10,
    normalization: str = "symmetric",
    exact: bool = False,
    capacity: int | None = None,
) -> Tensor | list[Tensor]:
    """Labels refined by the dense CRF: `dense_crf` of energies that hold each given label with `confidence`, and the
    most probable label of every pixel. The energies are never in memory.

    images: (N, H, W, 3) uint8, labels: (N, H, W) uint8 below n_labels -> (N, H, W) uint8; or lists of (H, W, 3) and
    (H, W) -> a list. Several label maps of one image, (N, K, H, W) or lists of (K, H, W), share its lattices.
    The energy is -log(confidence) for the given label and -log((1 - confidence) / (n_labels - 1)) for the others; for
    all alike where the label is `unsure` (for instance 255). The rest as for `dense_crf`.
    """
    op = "dense_crf_labels"
    stacked = isinstance(images, Tensor)
    each_image, each_labels = _paired(op, images, labels, "labels", "(N, H, W) or (N, K, H, W)", 3, 4)
    n_labels = contract.integer(op, "n_labels", n_labels, 1, 256)
    confidence = float(contract.number(op, "confidence", confidence))
    if not 0 < confidence < 1:
        raise ValueError(f"{op}: expected a confidence above 0 and below 1, got {confidence}")
    if unsure is not None:
        unsure = contract.integer(op, "unsure", unsure, 0, 255)
    maps = [
        _check_labels(op, image, given, n_labels, unsure) for image, given in zip(each_image, each_labels, strict=True)
    ]
    options = _options(op, gaussian, bilateral, iterations, normalization, exact, capacity)
    if not each_image:
        return labels.clone() if stacked else []
    contract.same_device(op, *each_image, *each_labels)
    if _ext.backend(_OP, each_image[0].device).name == "reference":
        terms = dict(gaussian=gaussian, bilateral=bilateral, iterations=iterations, normalization=normalization)
        results = [
            reference.dense_crf_labels(i, m, n_labels, confidence=confidence, unsure=unsure, **terms)
            for i, m in zip(each_image, maps, strict=True)
        ]
    else:
        none = -1 if unsure is None else unsure
        results = torch.ops.ribfast.dense_crf_labels(each_image, maps, n_labels, confidence, none, *options)
    results = [r if g.ndim == 3 else r[0] for r, g in zip(results, each_labels, strict=True)]
    return torch.stack(results) if stacked else results


def mean_field(
    unary: Tensor,
    lattices: Sequence[Lattice],
    strengths: Sequence[float],
    *,
    normalizations: str | Sequence[str] = "symmetric",
    iterations: int = 10,
    exact: bool = False,
    nan: str = "error",
    differentiable: bool = False,
) -> Tensor:
    """`dense_crf` with Potts terms over any lattices: unary (L, P) energies -> probabilities (L, P).

    strengths: of each lattice's term; normalizations: one for all, or one for each. The rest as for `dense_crf`.
    """
    op = "mean_field"
    contract.tensor(op, "unary", unary, 2, "(L, P)")
    lattices, strengths = list(lattices), [float(contract.number(op, "strengths", s)) for s in strengths]
    if isinstance(normalizations, str):
        normalizations = [normalizations] * len(lattices)
    if not len(lattices) == len(strengths) == len(normalizations):
        raise ValueError(f"{op}: expected a strength and a normalization for each lattice, got {len(lattices)} "
                         f"lattices, {len(strengths)} strengths and {len(normalizations)} normalizations")  # fmt: skip
    for lattice in lattices:
        if not isinstance(lattice, Lattice):
            raise TypeError(f"{op}: expected lattices to be ribfast.ops.Lattice objects, got {type(lattice).__name__}")
        if lattice.points != unary.shape[1] or lattice.device != unary.device:
            raise ValueError(f"{op}: expected lattices of the unary's {unary.shape[1]} points on {unary.device}, "
                             f"got one of {lattice.points} on {lattice.device}")  # fmt: skip
    if unary.shape[0] == 0:
        raise ValueError(f"{op}: expected unary (L, P) with at least one label, got shape {tuple(unary.shape)}")
    _check_finite(op, unary, nan)
    how = [_normalization(op, name) for name in normalizations]
    iterations = contract.integer(op, "iterations", iterations, 0)
    _check_choice(op, exact, differentiable)
    fused = all(lattice._reference is None for lattice in lattices)
    if differentiable or not fused or _ext.backend(_OP, unary.device).name == "reference":
        return reference.mean_field(
            unary.float(), lattices, strengths, normalizations=list(normalizations), iterations=iterations
        )
    tensors = [tensor for lattice in lattices for tensor in lattice._tensors]
    return torch.ops.ribfast.mean_field(unary, tensors, strengths, how, iterations, bool(exact))


def _by_autograd(image, unary, gaussian, bilateral, iterations, normalization):
    lattices = [Lattice(features, filled=True) for features in reference.image_features(image, gaussian, bilateral)]
    strengths = [term[-1] for term in (gaussian, bilateral) if term is not None]
    options = dict(normalizations=normalization, iterations=iterations)
    problems = unary.float().reshape(-1, unary.shape[-3], unary.shape[-2] * unary.shape[-1])
    q = [reference.mean_field(energies, lattices, strengths, **options) for energies in problems]
    return torch.stack(q).reshape(unary.shape) if q else unary.float()


def _paired(op: str, images, others, name: str, shape: str, *ndims: int) -> tuple[list, list]:
    """Each image and what belongs to it, from stacked tensors or lists."""
    if contract.stacked(op, "images", images, name, others) and (images.ndim != 4 or others.ndim not in ndims):
        raise ValueError(f"{op}: expected images (N, H, W, 3) and {name} {shape}, got shapes "
                         f"{tuple(images.shape)} and {tuple(others.shape)}")  # fmt: skip
    return contract.paired(op, "images", images, name, others, f"a {name}")


def _check_choice(op: str, exact: bool, differentiable: bool) -> None:
    if exact and differentiable:
        raise ValueError(
            f"{op}: expected exact or differentiable, got both; the gradient's loop has an order of its own"
        )


def _check_image(op: str, image) -> None:
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        got = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"{op}: expected images to be uint8 tensors (H, W, 3), got {got}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"{op}: expected images (H, W, 3) with at least one pixel, got shape {tuple(image.shape)}")


def _check_unary(image, energies, nan: str) -> None:
    contract.tensor(_OP, "unary", energies, shape="(L, H, W) or (K, L, H, W)")
    if energies.ndim not in (3, 4) or energies.shape[-3] == 0 or energies.shape[-2:] != image.shape[:2]:
        raise ValueError(f"{_OP}: expected unary (L, H, W) or (K, L, H, W) with L >= 1 and the image's size "
                         f"{tuple(image.shape[:2])}, got shape {tuple(energies.shape)}")  # fmt: skip
    _check_finite(_OP, energies, nan)


def _check_finite(op: str, energies: Tensor, nan: str) -> None:
    if nan not in ("error", "propagate"):
        raise ValueError(f"{op}: expected nan to be 'error' or 'propagate', got {nan!r}")
    if nan == "propagate" or (energies.is_cuda and torch.cuda.is_current_stream_capturing()):
        return  # a graph that is being captured has no values yet
    # a finite sum is the quick proof
    if not torch.isfinite(energies.sum()) and not torch.isfinite(energies).all():
        raise ValueError(f"{op}: expected finite energies, got NaN or infinity; clip probabilities before taking "
                         "their logarithm, or pass nan='propagate'")  # fmt: skip


def _check_labels(op: str, image, labels, n_labels: int, unsure: int | None) -> Tensor:
    """The label maps of one image, (K, H, W)."""
    _check_image(op, image)
    if not isinstance(labels, Tensor) or labels.dtype != torch.uint8:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{op}: expected labels to be uint8 tensors (H, W) or (K, H, W), got {got}")
    if labels.ndim not in (2, 3) or labels.shape[-2:] != image.shape[:2]:
        raise ValueError(f"{op}: expected labels (H, W) or (K, H, W) of the image's size {tuple(image.shape[:2])}, "
                         f"got shape {tuple(labels.shape)}")  # fmt: skip
    if labels.is_cuda and not torch.cuda.is_current_stream_capturing():  # elsewhere the operator looks
        wrong = labels >= n_labels if unsure is None else (labels >= n_labels) & (labels != unsure)
        if wrong.any():
            raise ValueError(f"{op}: expected labels below n_labels ({n_labels}) or `unsure` ({unsure}), "
                             f"got {labels[wrong][0].item()}")  # fmt: skip
    return labels if labels.ndim == 3 else labels[None]


def _options(op: str, gaussian, bilateral, iterations, normalization, exact, capacity) -> tuple:
    """What both operators take behind their tensors."""
    terms = _term(op, "gaussian", gaussian, 2), _term(op, "bilateral", bilateral, 3)
    iterations = contract.integer(op, "iterations", iterations, 0)
    capacity = 0 if capacity is None else contract.integer(op, "capacity", capacity, 1)
    return (*terms, iterations, _normalization(op, normalization), bool(exact), capacity)


def _normalization(op: str, name: str) -> int:
    if name not in NORMALIZATIONS:
        raise ValueError(f"{op}: expected normalization to be one of {', '.join(NORMALIZATIONS)}, got {name!r}")
    return NORMALIZATIONS.index(name)


def _term(op: str, name: str, term, count: int) -> list[float]:
    """A pairwise term as the operators take it: empty for None."""
    if term is None:
        return []
    try:
        numbers = [float(contract.number(op, name, number)) for number in term]
    except TypeError:
        raise TypeError(f"{op}: expected {name} to be {count} numbers or None, got {term!r}") from None
    if len(numbers) != count:
        raise ValueError(f"{op}: expected {name} to be {count} numbers or None, got {term!r}")
    if min(numbers[:-1]) <= 0:
        raise ValueError(f"{op}: expected {name} with standard deviations above 0, got {term!r}")
    return numbers


@torch.library.register_fake("ribfast::dense_crf")
def _(images, unary, gaussian, bilateral, iterations, normalization, exact, capacity):
    return [energies.new_empty(energies.shape, dtype=torch.float32) for energies in unary]


@torch.library.register_fake("ribfast::dense_crf_labels")
def _(images, labels, n_labels, confidence, unsure, gaussian, bilateral, iterations, normalization, exact, capacity):
    return [each.new_empty(each.shape) for each in labels]


@torch.library.register_fake("ribfast::mean_field")
def _(unary, lattices, strengths, normalizations, iterations, exact):
    return unary.new_empty(unary.shape, dtype=torch.float32)


for _name in ("dense_crf", "mean_field"):
    refuse_gradient(_name, "detach() it, or pass differentiable=True")
    run_as_is_under_autocast(_name)
run_as_is_under_autocast("dense_crf_labels")
