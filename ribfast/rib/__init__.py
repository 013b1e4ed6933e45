"""RIB: a classifier adapted to each image by itself, and the maps along the way summed."""

from .config import RIBConfig
from .engine import Engine, adapt, resolve_precision
from .job import Job, Result, Target
from .loading import BlockLoader
from .memory import keep_pages
from .others import Draws

__all__ = [
    "BlockLoader",
    "Draws",
    "Engine",
    "Job",
    "RIBConfig",
    "Result",
    "Target",
    "adapt",
    "keep_pages",
    "resolve_precision",
]
