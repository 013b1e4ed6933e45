"""The stages in order: each a function of data, a configuration and a store."""

from .cam import CamConfig, make_cams
from .cycle import train_cycle
from .evaluate import EvaluateConfig, evaluate_maps, evaluate_masks, read_threshold
from .masks import MasksConfig, make_masks
from .predict import PredictConfig, predict_masks
from .rib import AdaptConfig, adapt_maps
from .stage import Made, check_classes

__all__ = [
    "AdaptConfig",
    "CamConfig",
    "EvaluateConfig",
    "Made",
    "MasksConfig",
    "PredictConfig",
    "adapt_maps",
    "check_classes",
    "evaluate_maps",
    "evaluate_masks",
    "make_cams",
    "make_masks",
    "predict_masks",
    "read_threshold",
    "train_cycle",
]
