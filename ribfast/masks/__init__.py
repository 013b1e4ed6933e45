"""From class maps to masks: by a CRF, IRN's confident labels and walk, PMM's proportional masks, PAR and PAMR."""

from .irn import WalkConfig, boundaries, feature_affinity, walk_labels
from .labels import LabelConfig, confident_labels
from .methods import MaskConfig, make_masks
from .pmm import ppmg, smooth_by_variation

__all__ = [
    "LabelConfig",
    "MaskConfig",
    "WalkConfig",
    "boundaries",
    "confident_labels",
    "feature_affinity",
    "make_masks",
    "ppmg",
    "smooth_by_variation",
    "walk_labels",
]
