"""From class maps to masks: IRN's confident labels and random walk, PMM's proportional pseudo masks."""

from .irn import WalkConfig, boundaries, feature_affinity, walk_labels
from .labels import LabelConfig, confident_labels
from .pmm import ppmg, smooth_by_variation

__all__ = [
    "LabelConfig",
    "WalkConfig",
    "boundaries",
    "confident_labels",
    "feature_affinity",
    "ppmg",
    "smooth_by_variation",
    "walk_labels",
]
