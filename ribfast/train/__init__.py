"""Training: the classifier that class activation maps come from, IRN's network that spreads them, and the segmenter."""

from .adversarial import EaderConfig, train_eader
from .classifier import ClassifierConfig, train_classifier
from .irn import IrnConfig, train_irn
from .segmentation import SegmentationConfig, clear_segmenter, is_begun, refuse_begun, train_segmenter

__all__ = [
    "ClassifierConfig",
    "EaderConfig",
    "IrnConfig",
    "SegmentationConfig",
    "clear_segmenter",
    "is_begun",
    "refuse_begun",
    "train_classifier",
    "train_eader",
    "train_irn",
    "train_segmenter",
]
