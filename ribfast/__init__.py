"""Fast kernels and pipelines from image-level labels to segmentation masks."""

from . import ops, reference

__version__ = "0.1.0"
__all__ = ["ops", "reference"]
