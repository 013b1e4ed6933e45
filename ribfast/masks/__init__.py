"""From class maps to masks."""

from .pmm import ppmg, smooth_by_variation

__all__ = ["ppmg", "smooth_by_variation"]
