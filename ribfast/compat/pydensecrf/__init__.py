"""pydensecrf's names over ribfast's kernels: what inference uses of it. Only the import changes."""

from . import densecrf, utils

__all__ = ["densecrf", "utils"]
