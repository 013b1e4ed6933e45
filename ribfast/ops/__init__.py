"""The operators: C++ on the CPU, C++ or Triton on CUDA devices, each specified by ribfast.reference."""

from .accumulate_cams import accumulate_cams, accumulate_cams_batch
from .confusion_matrix import confusion_matrix
from .dense_crf import dense_crf, dense_crf_labels, mean_field
from .erase import erase
from .gndrp import gndrp
from .lattice import Lattice
from .normalize_cams import normalize_cams
from .pair_losses import pair_losses
from .path_affinity import pair_offsets, path_affinity
from .random_walk import random_walk
from .refine import refine
from .segmentation_loss import segmentation_loss
from .threshold_histogram import threshold_histogram

__all__ = [
    "Lattice",
    "accumulate_cams",
    "accumulate_cams_batch",
    "confusion_matrix",
    "dense_crf",
    "dense_crf_labels",
    "erase",
    "gndrp",
    "mean_field",
    "normalize_cams",
    "pair_losses",
    "pair_offsets",
    "path_affinity",
    "random_walk",
    "refine",
    "segmentation_loss",
    "threshold_histogram",
]
