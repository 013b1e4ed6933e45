"""From class maps to masks: IRN's confident labels and random walk."""

from .irn import WalkConfig, boundaries, feature_affinity, walk_labels
from .labels import LabelConfig, confident_labels

__all__ = ["LabelConfig", "WalkConfig", "boundaries", "confident_labels", "feature_affinity", "walk_labels"]
