"""Many feature maps of different sizes on one canvas, which a network's tail then computes in one pass, exactly.

A map's zero padding is the gutter around it: one free cell at least, at stride 8 and at stride 16, zeroed again in
front of every 3x3 convolution. So each map's values, and their gradients, are those that it would have alone.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """What canvases have in common whose maps may lie in each other's place."""

    own_rows: int  # at stride 16, as the others
    rows: int
    columns: int
    own: int  # maps
    others: tuple[tuple[int, int], ...]  # sizes of the others' maps at stride 8


class Canvas:
    """Where maps of sizes (h, w) at stride 8 lie: a target's own in the upper rows, those of others below.

    The upper rows are a canvas of their own (`part`), with the same cells. Offsets at stride 8 are even, so that every
    map keeps its own phase under a stride of 2. TensorFlow's padding begins windows at 0 for even sizes and at -1 for
    odd ones: there odd sizes get odd offsets. few_shapes: spare room, so that many targets' canvases have one shape.
    """

    def __init__(self, own, others=(), *, tensorflow_padding: bool = False, few_shapes: bool = False):
        self.sizes = [tuple(size) for size in (*own, *others)]
        self.n_own, self.few_shapes = len(own), few_shapes
        self.small = [((h + 1) // 2, (w + 1) // 2) for h, w in self.sizes]
        fit = arrange_roomily if few_shapes else arrange
        self.small_places, self.own_rows, self.rows, self.columns = fit(
            tuple(self.small[: self.n_own]), tuple(self.small[self.n_own :])
        )
        odd = 1 if tensorflow_padding else 0
        self.places = [
            (2 * y + odd * (h % 2), 2 * x + odd * (w % 2))
            for (y, x), (h, w) in zip(self.small_places, self.sizes, strict=True)
        ]
        self.mask = self._mask(self.places, self.sizes, 2)
        self.small_mask = self._mask(self.small_places, self.small, 1)

    @property
    def shape(self) -> Shape:
        return Shape(self.own_rows, self.rows, self.columns, self.n_own, tuple(self.sizes[self.n_own :]))

    def _mask(self, places, sizes, factor) -> Tensor:
        mask = torch.zeros(1, 1, factor * self.rows, factor * self.columns)
        for (y, x), (h, w) in zip(places, sizes, strict=True):
            mask[..., y : y + h, x : x + w] = 1
        return mask

    def masks(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(1, 1, rows, columns) at stride 8 and at stride 16: 0 in the gutter."""
        return self.mask.to(dtype), self.small_mask.to(dtype)

    def empty(self, channels: int, dtype: torch.dtype, device="cpu") -> Tensor:
        """Zeros (1, channels, 2 rows, 2 columns), to write features into."""
        shape = (1, 2 * self.rows, 2 * self.columns, channels)
        return torch.zeros(shape, dtype=dtype, device=device).permute(0, 3, 1, 2)

    def part(self, features: Tensor) -> Tensor:
        """The target's own part of a canvas of features."""
        return features[:, :, : 2 * self.own_rows]

    def write(self, canvas: Tensor, index: int, features: Tensor) -> None:
        (y, x), (h, w) = self.places[index], self.sizes[index]
        canvas[0, :, y : y + h, x : x + w].copy_(features)

    def cells(self, index: int) -> Tensor:
        """The numbers (h, w) of a map's cells at stride 16, row by row of the canvas."""
        (y, x), (h, w) = self.small_places[index], self.small[index]
        return (y + torch.arange(h))[:, None] * self.columns + x + torch.arange(w)


@lru_cache(maxsize=4096)
def arrange(own, others):
    """Places (y, x) of all rectangles with a free cell between them, the rows that `own` takes, all rows, the columns.

    Of all widths the one of the smallest canvas.
    """
    sizes = own + others
    widest, most = max(w for _, w in sizes), sum(w + 1 for _, w in sizes) - 1
    found = (_arrange(own, others, columns) for columns in range(widest, min(most, 6 * widest) + 1))
    return min(found, key=lambda each: each[2] * each[3])


@lru_cache(maxsize=4096)
def arrange_roomily(own, others):
    """Likewise, on canvases of few shapes: columns by the others' width, or by 16, and rows of `own` by 16."""
    pitch = others[0][1] + 1 if others else 16
    least = -(-(max(w for _, w in own + others) + 1) // pitch)
    found = (_arrange(own, others, pitch * count - 1, rows_by=16) for count in range(least, least + 3))
    return min(found, key=lambda each: each[2] * each[3])


def _arrange(own, others, columns: int, rows_by: int = 1):
    upper, own_rows = pack(own, columns)
    own_rows = -(-own_rows // rows_by) * rows_by
    lower, other_rows = pack(others, columns)
    begin = own_rows + 1 if own and others else own_rows
    return upper + [(y + begin, x) for y, x in lower], own_rows, begin + other_rows, columns


def pack(sizes, columns: int):
    """Places of rectangles and the rows they take: each as far up as it goes on the skyline of those before."""
    skyline, places, rows = [(0, 0)], [None] * len(sizes), 0  # from which column on, the first free row
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i][0], -sizes[i][1])):
        h, w = sizes[i]
        y, x = min(
            (max(free for at, free in skyline[begin:] if at <= x + w), x)
            for begin, (x, _) in enumerate(skyline)
            if x + w <= columns
        )
        end = x + w + 1  # with the gutter
        beyond = [free for at, free in skyline if at <= end][-1]
        left, right = [s for s in skyline if s[0] < x], [s for s in skyline if s[0] > end]
        skyline = left + [(x, y + h + 1)] + ([(end, beyond)] if end < columns else []) + right
        places[i], rows = (y, x), max(rows, y + h)
    return places, rows
