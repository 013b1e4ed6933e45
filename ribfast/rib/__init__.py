"""RIB: a classifier adapted to each image by itself, and the maps along the way summed."""

from .config import RIBConfig
from .engine import Engine, Result, Target, adapt
from .loading import BlockLoader
from .memory import keep_pages
from .others import Draws

__all__ = ["BlockLoader", "Draws", "Engine", "RIBConfig", "Result", "Target", "adapt", "keep_pages"]
