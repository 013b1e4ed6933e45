"""What the engine is given and gives back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Target:
    """An image: views, one (2, 3, h, w) for each of the config's scales, the image and its mirror, normalised."""

    views: list[Tensor]
    classes: list[int]  # present ones
    size: tuple[int, int]  # of the image, and of its maps
    reduced: tuple[int, int] | None = None  # what the image was reduced to before its views were made


@dataclass
class Result:
    maps: list[Tensor]  # for each scale (C, h, w): rectified maps of the image and its mirror, summed over the steps
    steps: int  # begun, the one that was stopped included
    stopped: bool  # by one of the stops
    keys: list[int] = field(default_factory=list)  # present classes
    cam: Tensor | None = None  # (keys, H / 4, W / 4), sums over the scales divided by their maxima
    high_res: Tensor | None = None  # (keys, H, W), likewise
    error: str | None = None  # why there are no maps
    lacks_memory: bool = False  # is why


@dataclass(eq=False)
class Job:
    """A target, the batches of others that it is adapted with, and what its owner calls it.

    watch(step, maps): is shown the maps as they are summed so far after each step, on the stream that makes them; from
    step 0 again where the image begins anew, and, on a GPU, of a step after the last one too, which changes nothing.
    """

    target: Target
    batches: "Batches | None" = None  # noqa: F821, of batches.py
    tag: Any = None
    watch: Callable[[int, list[Tensor]], None] | None = None
