"""The operators: C++ on the CPU, C++ or Triton on CUDA devices, each specified by ribfast.reference."""

from .accumulate_cams import accumulate_cams, accumulate_cams_batch
from .dense_crf import dense_crf
from .gndrp import gndrp
from .normalize_cams import normalize_cams

__all__ = ["accumulate_cams", "accumulate_cams_batch", "dense_crf", "gndrp", "normalize_cams"]
