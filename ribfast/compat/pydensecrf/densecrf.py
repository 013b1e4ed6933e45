"""pydensecrf.densecrf: DenseCRF and DenseCRF2D for inference, over ops.Lattice and ops.mean_field.

Two settings of this module, read by every call:

exact   False (or RIBFAST_CRF_EXACT=0, the default): within 5e-4 of pydensecrf's probabilities, about one label in
        100,000 pixels differs. True (RIBFAST_CRF_EXACT=1): its order of operations, within 1e-5.
        Fast is the default because speed is why one changes the import, and because scores of segmentations do not
        move by so little; exact is for comparing pixel by pixel with results that pydensecrf wrote. It concerns
        inference() with numbers for compat; vectors, matrices and single steps go through filters that need no choice.
nan     "error" (the default): setUnaryEnergy refuses energies of which no distribution can be made: NaN, -infinity, or
        +infinity for all labels of a pixel. One such pixel makes its whole image NaN in pydensecrf. "propagate": lets
        them through to the same end. +infinity for some labels of a pixel forbids them and is always accepted.

Arrays of any strides, byte order and number type are accepted, read-only ones too, and lists. Results are NumPy arrays
(labels, pixels), float32 and C-ordered. Standard deviations of 0 and features that are not finite, of which
pydensecrf dies, raise ValueError. The interpreter lock is free while the kernels run.
"""

import os
from enum import IntEnum
from functools import cached_property
from numbers import Number

import numpy as np
import torch
from torch import Tensor

from ... import ops

_asked = os.environ.get("RIBFAST_CRF_EXACT", "0")
if _asked not in ("0", "1"):
    raise RuntimeError(f"RIBFAST_CRF_EXACT: expected 0 or 1, got {_asked!r}")
exact = _asked == "1"
nan = "error"


class KernelType(IntEnum):
    """What learning may change of a kernel. Inference computes the same with each."""

    CONST_KERNEL = 0
    DIAG_KERNEL = 1
    FULL_KERNEL = 2


class NormalizationType(IntEnum):
    NO_NORMALIZATION = 0
    NORMALIZE_BEFORE = 1
    NORMALIZE_AFTER = 2
    NORMALIZE_SYMMETRIC = 3


CONST_KERNEL, DIAG_KERNEL, FULL_KERNEL = KernelType
NO_NORMALIZATION, NORMALIZE_BEFORE, NORMALIZE_AFTER, NORMALIZE_SYMMETRIC = NormalizationType
_NAMES = {
    NO_NORMALIZATION: "none",
    NORMALIZE_BEFORE: "before",
    NORMALIZE_AFTER: "after",
    NORMALIZE_SYMMETRIC: "symmetric",
}


class Unary:
    """Unary energies (labels, pixels)."""

    def __init__(self, energies):
        self.energies = energies


class ConstUnary(Unary):
    def __init__(self, u):
        super().__init__(_floats("ConstUnary", "u", u, 2, "(labels, pixels)"))


class LogisticUnary(Unary):
    """Energies L f of a linear classifier L (labels, features) and features f (features, pixels)."""

    def __init__(self, L, f):
        weights = _floats("LogisticUnary", "L", L, 2, "(labels, features)")
        features = _floats("LogisticUnary", "f", f, 2, "(features, pixels)")
        if weights.shape[1] != features.shape[0]:
            raise ValueError(f"LogisticUnary: expected L (labels, features) and f (features, pixels), got shapes "
                             f"{weights.shape} and {features.shape}")  # fmt: skip
        super().__init__(weights @ features)


class _Term:
    """A pairwise term: a lattice, how its filter is normalised, and the compatibility of labels."""

    def __init__(self, lattice, points: int, normalization: str, compatibility: float | Tensor):
        self.lattice, self.points = lattice, points
        self.normalization, self.compatibility = normalization, compatibility

    @cached_property
    def factors(self) -> tuple[Tensor | None, Tensor | None]:
        """What values are multiplied by before and after the filter."""
        if self.normalization == "none":
            return None, None
        mass = self.lattice.filter(torch.ones(self.points, 1)) + 1e-20
        if self.normalization == "symmetric":
            return (mass.rsqrt(),) * 2
        return (1 / mass, None) if self.normalization == "before" else (None, 1 / mass)

    def energies(self, q: Tensor) -> Tensor:
        """What each label would cost each pixel, (P, L): equal labels are cheap under Potts, hence its sign."""
        before, after = self.factors
        filtered = self.lattice.filter(q if before is None else q * before)
        filtered = filtered if after is None else filtered * after
        if isinstance(self.compatibility, float):
            return filtered * -self.compatibility
        return filtered @ self.compatibility if self.compatibility.ndim == 2 else filtered * self.compatibility


class DenseCRF:
    """A CRF over nvar points of any kind, each with one of nlabels labels."""

    def __new__(cls, nvar, nlabels, *_, **__):  # like pydensecrf's: subclasses may define another __init__
        self = super().__new__(cls)
        self._points, self._labels = int(nvar), int(nlabels)
        if min(self._points, self._labels) < 1:
            raise ValueError(f"{cls.__name__}: expected at least one point and one label, got {nvar} and {nlabels}")
        self._energies = torch.zeros(self._labels, self._points)
        self._terms = []
        return self

    def setUnary(self, unary):
        """Energies from ConstUnary or LogisticUnary."""
        if not isinstance(unary, Unary):
            raise TypeError(f"setUnary: expected a ConstUnary or LogisticUnary, got {type(unary).__name__}; "
                            "setUnaryEnergy takes arrays")  # fmt: skip
        self._set_energies("setUnary", unary.energies)

    def setUnaryEnergy(self, u, f=None):
        """Energies u (labels, pixels), as a copy; with features f, u f."""
        if f is not None:
            return self.setUnary(LogisticUnary(u, f))
        self._set_energies("setUnaryEnergy", _floats("setUnaryEnergy", "u", u, None, "(labels, pixels)"))

    def _set_energies(self, op, energies):
        wanted = (self._labels, self._points)
        if energies.shape != wanted:
            hint = f"; reshape(({self._labels}, -1)) it" if energies.size == self._labels * self._points else ""
            raise ValueError(f"{op}: expected energies (labels, pixels) = {wanted}, got shape {energies.shape}{hint}")
        if nan not in ("error", "propagate"):
            raise ValueError(f"{op}: expected the module's nan to be 'error' or 'propagate', got {nan!r}")
        if nan == "error" and not np.isfinite(energies.min(0)).all():
            raise ValueError(f"{op}: expected finite energies, got NaN or infinity; clip probabilities before taking "
                             f"their logarithm, or set {__name__}.nan = 'propagate'")  # fmt: skip
        self._energies = torch.from_numpy(energies)

    def addPairwiseEnergy(self, features, compat, kernel=DIAG_KERNEL, normalization=NORMALIZE_SYMMETRIC):
        """A Gaussian kernel of features (dimensions, pixels), which are divided by their standard deviations.

        compat: a number w (Potts: equal labels attract), a vector (labels,) or a matrix (labels, labels) that is
        symmetrised. Vectors and matrices are costs: -w times the identity equals the number w.
        """
        op = "addPairwiseEnergy"
        features = _floats(op, "features", features, 2, "(dimensions, pixels)")
        if features.shape[0] == 0 or features.shape[1] != self._points:
            hint = "; transpose it" if features.shape[0] == self._points else ""
            raise ValueError(f"{op}: expected features (dimensions, pixels) with {self._points} pixels, "
                             f"got shape {features.shape}{hint}")  # fmt: skip
        self._add(op, features.T, compat, kernel, normalization)

    def _add(self, op, features, compat, kernel, normalization):
        """features: (pixels, dimensions)"""
        try:
            KernelType(kernel)
            how = _NAMES[NormalizationType(normalization)]
        except ValueError as error:
            raise ValueError(f"{op}: expected one of the module's constants for kernel and normalization, "
                             f"got {kernel!r} and {normalization!r}") from error  # fmt: skip
        if not np.isfinite(features).all():
            raise ValueError(f"{op}: expected finite features, got NaN or infinity")
        compatibility = _compatibility(op, compat, self._labels)
        lattice = ops.Lattice(torch.from_numpy(np.ascontiguousarray(features)), filled=True)
        self._terms.append(_Term(lattice, self._points, how, compatibility))

    def inference(self, niter):
        """Probabilities (labels, pixels) after niter parallel updates."""
        iterations = max(int(niter), 0)
        terms = self._terms
        if terms and all(isinstance(term.compatibility, float) for term in terms):
            q = ops.mean_field(
                self._energies,
                [term.lattice for term in terms],
                [term.compatibility for term in terms],
                normalizations=[term.normalization for term in terms],
                iterations=iterations,
                exact=bool(exact),
                nan="propagate",  # setUnaryEnergy has looked at them
            )
        else:
            q = self._start()
            for _ in range(iterations):
                q = self._step(q)
            q = q.T
        return np.ascontiguousarray(q.numpy())

    def startInference(self):
        """(Q, tmp1, tmp2) for stepInference: Q holds the probabilities; nothing is kept in the others."""
        return np.ascontiguousarray(self._start().T.numpy()), np.empty((0, 0), "f"), np.empty((0, 0), "f")

    def stepInference(self, Q, tmp1=None, tmp2=None):
        """One update of Q, in place."""
        if not isinstance(Q, np.ndarray):
            raise TypeError(f"stepInference: expected the Q that startInference returned, got {type(Q).__name__}")
        Q[...] = self._step(self._probabilities("stepInference", Q)).T.numpy()

    def klDivergence(self, Q):
        """The variational free energy of Q: the divergence from the CRF's distribution, up to a constant."""
        q = self._probabilities("klDivergence", Q)
        total = (q * q.clamp(min=1e-20).log()).sum(dtype=torch.float64)
        total += torch.where(q == 0, 0, self._energies.T * q).sum(dtype=torch.float64)  # not 0 * inf
        for term in self._terms:
            total += (q * term.energies(q)).sum(dtype=torch.float64)
        return total.item()

    def _probabilities(self, op, q) -> Tensor:
        q = _floats(op, "Q", q, 2, "(labels, pixels)")
        if q.shape != (self._labels, self._points):
            raise ValueError(f"{op}: expected Q of shape {(self._labels, self._points)}, got {q.shape}")
        return torch.from_numpy(q.T)

    def _start(self) -> Tensor:
        """(P, L)"""
        return (-self._energies.T).softmax(1)

    def _step(self, q: Tensor) -> Tensor:
        total = -self._energies.T
        for term in self._terms:
            total -= term.energies(q)
        return total.softmax(1)


class DenseCRF2D(DenseCRF):
    """A CRF over the pixels of an image of width w and height h."""

    def __new__(cls, w, h, nlabels, *_, **__):
        if min(int(w), int(h)) < 1:
            raise ValueError(f"{cls.__name__}: expected a width and a height of at least 1, got {w} and {h}")
        self = super().__new__(cls, int(w) * int(h), nlabels)
        self._width, self._height = int(w), int(h)
        return self

    def addPairwiseGaussian(self, sxy, compat, kernel=DIAG_KERNEL, normalization=NORMALIZE_SYMMETRIC):
        """Pixels that are near each other, sxy: standard deviation in pixels, or (x, y). compat: addPairwiseEnergy."""
        op = "addPairwiseGaussian"
        positions = self._positions(_deviations(op, "sxy", sxy, 2))
        self._add(op, positions.reshape(self._points, 2), compat, kernel, normalization)

    def addPairwiseBilateral(self, sxy, srgb, rgbim, compat, kernel=DIAG_KERNEL, normalization=NORMALIZE_SYMMETRIC):
        """Pixels near each other and of similar colour, srgb: standard deviation of the values, or (r, g, b).

        rgbim: (h, w, 3) of any number type; its values are taken as they are, 0 to 255 for the usual srgb.
        """
        op = "addPairwiseBilateral"
        image = _floats(op, "rgbim", rgbim, None, "(h, w, 3)")
        wanted = (self._height, self._width, 3)
        if image.shape != wanted:
            hint = "; DenseCRF2D takes the width first" if image.shape == (self._width, self._height, 3) else ""
            if image.shape[:2] == wanted[:2]:
                hint = "; for other channels see utils.create_pairwise_bilateral"
            raise ValueError(f"{op}: expected rgbim (h, w, 3) = {wanted}, got shape {image.shape}{hint}")
        colours = image / _deviations(op, "srgb", srgb, 3)
        features = np.concatenate([self._positions(_deviations(op, "sxy", sxy, 2)), colours], axis=2)
        self._add(op, features.reshape(self._points, 5), compat, kernel, normalization)

    def _positions(self, deviations):
        """(h, w, 2): x, then y"""
        x, y = (np.arange(side, dtype=np.float32) for side in (self._width, self._height))
        return np.stack(np.meshgrid(x / deviations[0], y / deviations[1]), axis=2)


def _refusing(name):
    def refuse(self, *_, **__):
        raise NotImplementedError(
            f"{name}: only learning a CRF's parameters needs it; ribfast.compat.pydensecrf does inference"
        )

    refuse.__name__ = name
    return refuse


for _name in (
    "gradient",
    "unaryParameters",
    "setUnaryParameters",
    "labelCompatibilityParameters",
    "setLabelCompatibilityParameters",
    "kernelParameters",
    "setKernelParameters",
):
    setattr(DenseCRF, _name, _refusing(_name))


def _floats(op, name, value, ndim, shape):
    """A float32, C-ordered, writable copy."""
    value = np.asarray(value)
    if value.dtype.kind not in "fiub":
        raise TypeError(f"{op}: expected {name} {shape} of real numbers, got {value.dtype}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{op}: expected {name} {shape}, got shape {value.shape}")
    return np.array(value, np.float32, order="C")


def _deviations(op, name, value, count):
    """`count` standard deviations, from one number or from one for each; more are ignored, as in pydensecrf."""
    numbers = [value] * count if isinstance(value, Number) else list(value)
    if len(numbers) < count:
        raise ValueError(f"{op}: expected {name} to be a number or {count} numbers, got {value!r}")
    numbers = np.array(numbers[:count], np.float32)
    if not (numbers > 0).all():
        raise ValueError(f"{op}: expected {name} with standard deviations above 0, got {value!r}")
    return numbers


def _compatibility(op, compat, labels) -> float | Tensor:
    """A number, a vector, or a symmetric matrix"""
    costs = _floats(op, "compat", compat, None, "a number, (labels,) or (labels, labels)")
    if costs.shape not in ((), (labels,), (labels, labels)):
        raise ValueError(f"{op}: expected compat to be a number, ({labels},) or ({labels}, {labels}), "
                         f"got shape {costs.shape}")  # fmt: skip
    if not np.isfinite(costs).all():
        raise ValueError(f"{op}: expected a finite compat, got NaN or infinity")
    if costs.ndim == 0:
        return float(costs)
    return torch.from_numpy(costs if costs.ndim == 1 else (costs + costs.T) / 2)
