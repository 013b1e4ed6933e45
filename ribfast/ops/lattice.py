"""The permutohedral lattice: Gaussian filters of any points, kept to filter many values; fake kernels, autograd."""

import torch
from torch import Tensor

from .. import _ext, reference
from . import contract
from .registration import run_as_is_under_autocast

_OP = "lattice"
MOST_DIMENSIONS = 8


class Lattice:
    """A Gaussian filter over points in 1 to 8 dimensions (Adams, Baek and Davis 2010), built once, for any values.

    features: (P, d), positions divided by the standard deviations of the kernel exp(-|f_i - f_j|^2 / 2). They are no
    part of a gradient.
    filled: as pydensecrf builds its lattices, which fills the last group of four points up with points at the origin:
    without weight, but where P is no multiple of 4 the result is slightly another.
    """

    def __init__(self, features: Tensor, *, filled: bool = False):
        contract.tensor(_OP, "features", features, 2, "(P, d)")
        points, dims = features.shape
        if not 1 <= dims <= MOST_DIMENSIONS:
            raise ValueError(f"{_OP}: expected features of 1 to {MOST_DIMENSIONS} dimensions, got shape (P, d) = "
                             f"{(points, dims)}")  # fmt: skip
        self.points, self.dims, self.device = points, dims, features.device
        features = features.detach()
        if features.is_cuda and not torch.cuda.is_current_stream_capturing() and not torch.isfinite(features).all():
            raise ValueError(f"{_OP}: expected finite features, got NaN or infinity")
        if _ext.backend(_OP, features.device).name == "reference":
            self._tensors, self._reference = None, reference.Lattice(features, filled=filled)
        else:
            self._tensors, self._reference = torch.ops.ribfast.lattice(features, bool(filled)), None

    def filter(self, values: Tensor, *, transpose: bool = False) -> Tensor:
        """sum over j of k(f_i, f_j) values_j, not normalised: (P, C) -> (P, C), or (P,) -> (P,).

        Differentiable with respect to the values. Computed in float32, returned in the values' dtype. `transpose`: of
        the filter, whose blur goes through the axes in reverse; the two differ by the lattice's own error alone.
        """
        contract.tensor("lattice_filter", "values", values)
        if values.ndim not in (1, 2) or values.shape[0] != self.points:
            raise ValueError(f"lattice_filter: expected values (P, C) or (P,) with the lattice's {self.points} points, "
                             f"got shape {tuple(values.shape)}")  # fmt: skip
        if values.device != self.device:
            raise ValueError(f"lattice_filter: expected values on the lattice's device {self.device}, "
                             f"got {values.device}")  # fmt: skip
        columns = values if values.ndim == 2 else values[:, None]
        if self._reference is not None:
            result = self._reference.filter(columns.float(), transpose=transpose).to(values.dtype)
        else:
            result = torch.ops.ribfast.lattice_filter(columns, self._tensors, bool(transpose))
        return result if values.ndim == 2 else result[:, 0]


@torch.library.register_fake("ribfast::lattice")
def _(features, filled):
    size = torch.library.get_ctx().new_dynamic_size
    points, corners = features.shape[0], features.shape[1] + 1
    places = features.new_empty(((points + 15) // 16, corners, 16), dtype=torch.int32)
    weights = places.new_empty(places.shape, dtype=torch.float32)
    if features.device.type == "cuda":
        neighbours = places.new_empty((corners, (points + filled) * corners + 1, 2))
        return [places, weights, neighbours, places.new_empty((size(),), dtype=torch.uint8)]
    return [places, weights, places.new_empty((size(),)), places.new_empty((corners * 8 + 3,), dtype=torch.int64)]


@torch.library.register_fake("ribfast::lattice_filter")
def _(values, lattice, transpose):
    return values.new_empty(values.shape)


def _save(ctx, inputs, output):
    _, ctx.lattice, ctx.transpose = inputs  # none of it is an input of a gradient


def _backward(ctx, grad):
    return torch.ops.ribfast.lattice_filter(grad, ctx.lattice, not ctx.transpose), [None] * len(ctx.lattice), None


torch.library.register_autograd("ribfast::lattice_filter", _backward, setup_context=_save)
run_as_is_under_autocast("lattice")
run_as_is_under_autocast("lattice_filter")
