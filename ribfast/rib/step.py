"""One step of one image: maps, stops, loss, update. Nothing here waits for the device, so a step can be captured.

L_RIB = - sum over rows and present classes of the pooled logits, min(margin, .) where there is a margin.
"""

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from .canvas import Canvas
from .config import RIBConfig
from .tail import Tail, Weights

LOSS_SCALE = 1024.0  # of float16 gradients; the loss is linear in the logits, so their size is known


class Rows:
    """Which of a canvas's first n cells form each row that is pooled; no two rows share a cell."""

    def __init__(self, cells: list[Tensor], n: int, device, positions: int | None = None):
        """positions: places for each row's cells; None: as many as the longest has."""
        positions = positions or max((c.numel() for c in cells), default=0)
        places = torch.zeros(len(cells), positions, dtype=torch.long)
        real = torch.zeros(len(cells), positions, dtype=torch.bool)
        row_of = torch.full((n,), len(cells))  # of a cell in none
        for row, c in enumerate(cells):
            places[row, : c.numel()] = c.flatten()
            real[row, : c.numel()] = True
            row_of[c.flatten()] = row
        member = F.one_hot(row_of, len(cells) + 1)[:, :-1].float()
        self.cells, self.real, self.row_of, self.member = (t.to(device) for t in (places, real, row_of, member))

    def clone(self) -> "Rows":
        own = copy.copy(self)
        own.cells, own.real, own.row_of, own.member = (tensor.clone() for tensor in self.tensors())
        return own

    def tensors(self) -> list[Tensor]:
        return [self.cells, self.real, self.row_of, self.member]

    def take(self, maps: Tensor) -> Tensor:
        """maps (C, cells of the canvas) -> (C, rows, positions); where `real` is not, values mean nothing."""
        return maps[:, self.cells]

    def pool(self, maps: Tensor, config: RIBConfig) -> Tensor:
        """maps (C, cells of the canvas) -> (rows, C): what `reference.gndrp` makes of present classes, or the mean."""
        maps, kept, count = maps[:, : len(self.row_of)], self.row_of < len(self.cells), self.member.sum(0)
        if config.pooling == "gndrp":
            held = maps.detach()
            top = self.take(held).masked_fill(~self.real, -torch.inf).amax(2) + 0.0  # -0.0 counts as 0.0
            top = F.pad(top, (0, 1))[:, self.row_of]
            level = held / top
            kept = kept & ((level < config.tau if config.strict else level <= config.tau) | top.isnan())
            if config.divide_by == "kept":
                count = (kept.float() @ self.member).clamp(min=1)
        return (torch.where(kept, maps, 0) @ self.member / count).T


class Layout:
    """A target's views, and other images if any, on a canvas, with what the steps ask of it."""

    def __init__(self, canvas: Canvas, config: RIBConfig, dtype: torch.dtype, device):
        self.canvas = canvas
        cells = [canvas.cells(i) for i in range(len(canvas.sizes))]
        pooled = [2 * i + mirror for i, s in enumerate(config.scales) if s in config.loss_scales for mirror in (0, 1)]
        # an image and its mirror are of one size, so that none takes more than half of the own part
        most = canvas.own_rows * canvas.columns // 2 if canvas.few_shapes else None
        n_own = canvas.own_rows * canvas.columns
        self.own = Rows([cells[i] for i in pooled], n_own, device, most)
        self.others = Rows(cells[canvas.n_own :], canvas.rows * canvas.columns, device)
        first = 2 * config.scales.index(1.0)
        self.pair = Rows(
            [cells[first], cells[first + 1].flip(1)], n_own, device, most
        )  # scale 1, the mirror turned back
        until_scale_1 = torch.zeros(n_own)
        until_scale_1[torch.cat([c.flatten() for c in cells[: first + 2]])] = 1
        self.until_scale_1 = until_scale_1.to(device)
        self.masks = tuple(mask.to(device) for mask in canvas.masks(dtype))

    @property
    def own_masks(self) -> tuple[Tensor, Tensor]:
        rows = self.canvas.own_rows
        return self.masks[0][:, :, : 2 * rows], self.masks[1][:, :, :rows]

    def clone(self) -> "Layout":
        """With tensors of its own."""
        own = copy.copy(self)
        own.masks, own.until_scale_1 = tuple(mask.clone() for mask in self.masks), self.until_scale_1.clone()
        own.own, own.others, own.pair = self.own.clone(), self.others.clone(), self.pair.clone()
        return own

    def tensors(self) -> list[Tensor]:
        """All that a step reads of it."""
        rows = (self.own, self.others, self.pair)
        return [*self.masks, self.until_scale_1, *(tensor for each in rows for tensor in each.tensors())]

    def copy_(self, other: "Layout") -> None:
        """The other one's places in this one's tensors; their canvases have one shape."""
        self.canvas = other.canvas
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)

    def maps(self, canvas_maps: Tensor) -> list[Tensor]:
        """Rectified maps (C, cells of the own part) -> for each scale (C, h, w): the image's and its mirror's."""
        canvas = self.canvas
        on_canvas = canvas_maps.view(len(canvas_maps), canvas.own_rows, canvas.columns)
        instances = [
            on_canvas[:, y : y + h, x : x + w]
            for (y, x), (h, w) in list(zip(canvas.small_places, canvas.small, strict=True))[: canvas.n_own]
        ]
        return [upright + mirrored.flip(-1) for upright, mirrored in zip(instances[::2], instances[1::2], strict=True)]


class Run:
    """One image on its way through the steps: all of its state, on the device."""

    def __init__(self, tail: Tail, config: RIBConfig, n_classes: int, device):
        self.tail, self.config, self.weights = tail, config, Weights(tail)
        self.scale = LOSS_SCALE if tail.dtype == torch.float16 else 1.0
        self.rates = torch.tensor([config.rate(k) for k in range(config.steps)], device=device)
        self.present = torch.zeros(n_classes, dtype=torch.bool, device=device)
        self.steps = torch.zeros((), dtype=torch.long, device=device)  # begun
        self.alive = torch.ones((), dtype=torch.bool, device=device)  # whether another step follows
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def start(self, present: Tensor) -> None:
        self.weights.reset()
        self.present.copy_(present)
        self.steps.zero_()
        self.alive.fill_(True)
        self.finite.fill_(True)

    def observe(self, features: Tensor, layout: Layout, sums: Tensor, others: Tensor | None = None) -> Tensor:
        """Adds this step's maps to sums (C, cells of the own part), decides whether to go on, returns the loss.

        features: the canvas; its own part where others, the present classes (rows, C) of the other images, is None.
        """
        config = self.config
        maps = self.tail(features, layout.own_masks if others is None else layout.masks, self.weights).float()
        rectified = maps.detach()[:, : sums.shape[1]].relu()
        stop = self._exploded(rectified, layout)
        # the guard looks at scale 1: of a step in which it stops, the scales after that one do not count
        counted = torch.where(stop, layout.until_scale_1, 1.0)
        sums.add_(torch.where(self.alive, rectified * counted, 0))
        own = torch.where(self.present, layout.own.pool(maps, config), 0)
        if config.stop_logit is not None:
            stop = stop | (own.detach().sum().abs() > config.stop_logit)
        loss = self.loss(own)
        if others is not None:
            loss = loss + self.loss(torch.where(others, layout.others.pool(maps, config), 0))
        finite = loss.detach().isfinite()
        self.finite.logical_and_(finite | ~self.alive)
        self.steps.add_(self.alive)
        self.alive.logical_and_(~stop & finite)
        return loss

    def loss(self, logits: Tensor) -> Tensor:
        """logits: (rows, C), 0 where a class is absent."""
        return -(logits if self.config.margin is None else logits.clamp(max=self.config.margin)).sum()

    def _exploded(self, rectified: Tensor, layout: Layout) -> Tensor:
        """Whether, after step 0, the union over present classes of map / maximum > level covers too much."""
        if self.config.explode_area is None:
            return torch.zeros_like(self.alive)
        cam = layout.pair.take(rectified).sum(1)  # padded positions repeat cell 0, so they are masked
        real = layout.pair.real[0]
        top = cam.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
        high = (cam / top > self.config.explode_level) & self.present[:, None] & real
        return (self.steps > 0) & (high.any(0).sum() > self.config.explode_area * real.sum())

    def update(self, loss: Tensor, anchor: list[Tensor] | None = None) -> None:
        """A step of SGD, if another one follows; anchor: the gradients of others that the loss does not hold."""
        gradients = self.weights.gradients(loss, scale=self.scale)
        if self.tail.dtype == torch.float16:
            finite = torch.stack(torch._foreach_norm(gradients, torch.inf)).isfinite().all()
            self.finite.logical_and_(finite | ~self.alive)
            self.alive.logical_and_(finite)
        rate = torch.where(self.alive, self.rates.take(self.steps.sub(1).clamp(min=0)), 0.0)
        self.weights.update(gradients, anchor, rate, self.config, scale=self.scale)
