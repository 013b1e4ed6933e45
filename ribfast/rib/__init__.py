"""RIB: a classifier adapted to each image by itself, and the maps along the way summed."""

from .config import RIBConfig
from .engine import Engine, Result, Target, adapt

__all__ = ["Engine", "RIBConfig", "Result", "Target", "adapt"]
