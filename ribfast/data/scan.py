"""Every problem of a data set at once, before a long run finds them one by one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import lacks_memory
from .loading import prefetch
from .sources import Item, Source, check_mask

SHOWN = 10  # problems that an error names


class Problem(NamedTuple):
    """The image's name, and what is wrong with it or its mask."""

    name: str
    reason: str


@dataclass(frozen=True)
class Scan:
    """What a data set holds. pixels (C + 2,) int64, of masks without problems: background, each class, 255."""

    classes: tuple[str, ...]
    images: int
    masks: int
    pixels: np.ndarray
    problems: tuple[Problem, ...]

    def absent(self) -> list[str]:
        """The classes without a pixel."""
        return [name for name, count in zip(self.classes, self.pixels[1:-1], strict=True) if not count]

    def check(self, op: str) -> None:
        """Raises one ValueError for all problems."""
        if not self.problems:
            return
        count, more = len(self.problems), len(self.problems) - SHOWN
        lines = [f"  {name}: {reason}" for name, reason in self.problems[:SHOWN]] + [f"  and {more} more"] * (more > 0)
        raise ValueError(f"{op}: expected {self.images} images without problems, got {count} "
                         f"problem{'s' * (count > 1)}; mend these, or take the images off the list; `ribfast scan` "
                         "shows all:\n" + "\n".join(lines))  # fmt: skip


def scan(
    source: Source,
    masks: Callable[[str], np.ndarray] | None = None,
    *,
    required: bool = True,
    also: Callable[[Item, np.ndarray, np.ndarray | None], None] | None = None,
    workers: int = 2,
    progress: Callable[[int, int, str], None] | None = None,
) -> Scan:
    """Decodes every image and mask; what is wrong with them becomes a problem and stops nothing.

    masks: name -> (H, W) uint8, raising OSError, ValueError or KeyError where it cannot; None: the source's own.
    required: whether an image of the source without a mask is a problem. also: what else must hold of an image and its
    mask, called by several threads; its ValueError or OSError is a problem too.
    """

    def read_mask(item: Item, size: tuple[int, int] | None) -> np.ndarray | None:
        if masks is not None:
            mask = masks(item.name)
            if not isinstance(mask, np.ndarray) or mask.dtype != np.uint8 or mask.ndim != 2:
                kind = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
                raise ValueError(f"scan: expected a mask (H, W) in uint8, got {kind}; convert it")
            check_mask(mask, size, len(source.classes), "scan")
            return mask
        mask = source.mask(item, size)
        if mask is None and required:
            raise ValueError(f"scan: expected a mask of {item.image}, got none; add it")
        return mask

    def look(item: Item, *, alone: bool = False) -> tuple[list[str], np.ndarray | None] | None:
        """None where memory lacked, and others were in it."""
        try:
            return seen(item)
        except Exception as error:
            if not lacks_memory(error):
                raise
            said = (str(error).splitlines() or [type(error).__name__])[0]  # OpenCV's has an empty line
            return ([f"scan: not enough memory: {said}; reduce the image, or free some"], None) if alone else None

    def reason(error: Exception) -> str:
        if lacks_memory(error):
            raise error
        return str(error)

    def seen(item: Item) -> tuple[list[str], np.ndarray | None]:
        reasons, image, mask = [], None, None
        try:
            image = source.image(item)
        except (OSError, ValueError) as error:
            reasons.append(reason(error))
        try:
            mask = read_mask(item, None if image is None else image.shape[:2])
        except KeyError:
            reasons.append("scan: expected a mask, got none; make it first")
        except (OSError, ValueError) as error:
            reasons.append(reason(error))
        if not reasons and also is not None:
            try:
                also(item, image, mask)
            except (OSError, ValueError) as error:
                reasons.append(reason(error))
        return reasons, None if mask is None or reasons else np.bincount(mask.ravel(), minlength=256)

    counts, whole, problems, late = np.zeros(256, np.int64), 0, [], []
    if not len(source):
        problems.append(Problem("the list", "scan: expected at least one image, got none; fill the list"))
    found = prefetch(look, source, workers=workers, ahead=max(2, 2 * workers))

    def add(item: Item, reasons: list[str], labels: np.ndarray | None) -> None:
        nonlocal whole, counts
        problems.extend(Problem(item.name, reason) for reason in reasons)
        if labels is not None:
            counts += labels
            whole += 1

    if progress is not None:
        progress(0, len(source), "")
    for done, (item, result) in enumerate(zip(source, found, strict=True), 1):
        if result is None:
            late.append(item)
        else:
            add(item, *result)
        if progress is not None:
            progress(done, len(source), item.name)
    for item in late:
        add(item, *look(item, alone=True))
    pixels, labels = np.zeros(len(source.classes) + 2, np.int64), min(len(source.classes) + 1, 255)
    pixels[:labels], pixels[-1] = counts[:labels], counts[255]
    return Scan(source.classes, len(source), whole, pixels, tuple(problems))
