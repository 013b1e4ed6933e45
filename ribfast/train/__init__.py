"""Training: the classifier that class activation maps come from."""

from .classifier import ClassifierConfig, train_classifier

__all__ = ["ClassifierConfig", "train_classifier"]
