"""Training: the classifier that class activation maps come from, and IRN's network that spreads them."""

from .classifier import ClassifierConfig, train_classifier
from .irn import IrnConfig, train_irn

__all__ = ["ClassifierConfig", "IrnConfig", "train_classifier", "train_irn"]
