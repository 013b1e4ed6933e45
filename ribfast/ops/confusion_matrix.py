"""Pixels by true and predicted label: wrapper, contract, fake kernel."""

import torch
from torch import Tensor

from .. import _ext, reference
from . import contract
from .registration import run_as_is_under_autocast


def confusion_matrix(labels: Tensor, mask: Tensor, n_labels: int) -> Tensor:
    """Count pixels by their true label in mask and the predicted one in labels, both (H, W) uint8.

    Labels lie below n_labels; pixels whose mask is 255 are left out. Returns (n_labels, n_labels) int64, rows true.
    """
    contract.labels("confusion_matrix", "labels", labels)
    contract.labels("confusion_matrix", "mask", mask)
    contract.same_device("confusion_matrix", labels, mask)
    n_labels = contract.count("confusion_matrix", "n_labels", n_labels, most=255)
    if labels.shape != mask.shape:
        raise ValueError(f"confusion_matrix: expected labels of the mask's shape {tuple(mask.shape)}, got "
                         f"{tuple(labels.shape)}")  # fmt: skip
    if _ext.backend("confusion_matrix", mask.device).name == "reference":
        return reference.confusion_matrix(labels, mask, n_labels)
    return torch.ops.ribfast.confusion_matrix(labels, mask, n_labels)


@torch.library.register_fake("ribfast::confusion_matrix")
def _(labels, mask, n_labels):
    return mask.new_empty((n_labels, n_labels), dtype=torch.int64)


run_as_is_under_autocast("confusion_matrix")
