"""Data: labelled photographs and their masks, and what networks are fed from them."""

from .images import (
    IMAGENET,
    NORMALIZATIONS,
    SYMMETRIC,
    Augmentation,
    Normalization,
    make_views,
    reduce_to,
    rescale,
    scaled_size,
)
from .loading import ImageCache, prefetch
from .scan import Problem, Scan, scan
from .sources import VOC_CLASSES, Item, Source, open_images, open_source, places_of

__all__ = [
    "IMAGENET",
    "NORMALIZATIONS",
    "SYMMETRIC",
    "VOC_CLASSES",
    "Augmentation",
    "ImageCache",
    "Item",
    "Normalization",
    "Problem",
    "Scan",
    "Source",
    "make_views",
    "open_images",
    "open_source",
    "places_of",
    "prefetch",
    "reduce_to",
    "rescale",
    "scaled_size",
    "scan",
]
