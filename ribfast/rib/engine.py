"""Adapting images: what is computed once, what at each step, and in which order."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..cams import merge_cams
from ..models import CamClassifier
from .canvas import Canvas
from .config import RIBConfig
from .memory import keep_pages
from .step import Layout, Rows, Run
from .tail import Tail

log = logging.getLogger("ribfast")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Others = Callable[[int], tuple[Tensor, Tensor]]


@dataclass
class Target:
    """An image: views, one (2, 3, h, w) for each of the config's scales, the image and its mirror, normalised."""

    views: list[Tensor]
    classes: list[int]  # present ones
    size: tuple[int, int]


@dataclass
class Result:
    maps: list[Tensor]  # for each scale (C, h, w): rectified maps of the image and its mirror, summed over the steps
    steps: int  # begun, the one that was stopped included
    stopped: bool  # by one of the stops
    keys: list[int] = field(default_factory=list)  # present classes
    cam: Tensor | None = None  # (keys, H / 4, W / 4), sums over the scales divided by their maxima
    high_res: Tensor | None = None  # (keys, H, W), likewise
    error: str | None = None  # why there are no maps


def adapt(
    model: CamClassifier, targets: Sequence[Target], others: Others | None, config: RIBConfig | None = None
) -> list[Result]:
    """Adapts the model to each target by itself and sums its maps along the way; the model stays as it is.

    others(step) -> images (B, 3, h, w), present (B, C) bool: the other images of a step, the same for all targets
    of one call. It is called once for each step that uses them. None: no other images.
    """
    return Engine(model, config or RIBConfig.released()).adapt(targets, others)


class Engine:
    """A model and a config, prepared once for many calls of `adapt`; the model must not change meanwhile."""

    @torch.inference_mode(False)
    def __init__(self, model: CamClassifier, config: RIBConfig):
        if not isinstance(model, CamClassifier):
            raise TypeError(f"adapt: expected a classifier of ribfast.models, got {type(model).__name__}")
        for name, value in model.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"adapt: expected finite weights, got NaN or infinity in {name}")
        self.model, self.config = model, config
        self.device, self.n_classes = model.classifier.weight.device, model.n_classes
        self.dtype = DTYPES[best_precision(self.device) if config.precision == "auto" else config.precision]
        self.tail = Tail(model, self.dtype)
        self.run = Run(self.tail, config, self.n_classes, self.device)
        self._layouts = {}

    def adapt(self, targets: Sequence[Target], others: Others | None) -> list[Result]:
        targets = list(targets)
        if not targets:
            raise ValueError("adapt: expected at least one target, got an empty list")
        for number, target in enumerate(targets):
            self._check_target(number, target)
        group = self.group([c for target in targets for c in target.classes], others, shared=len(targets) > 1)
        with keep_pages():
            return [group(target) for target in targets]

    def group(
        self,
        classes: Iterable[int],
        others: Others | None,
        *,
        shared: bool = True,
        watch: Callable[[int, list[Tensor]], None] | None = None,
    ) -> Callable[[Target], Result]:
        """What adapts targets of these classes that see the same others, one after another as they come.

        watch(step, maps): is shown the maps as they are summed so far after each step.
        """
        batches = None if others is None else Batches(self, classes, others, shared)

        def adapt_one(target: Target) -> Result:
            self._check_target(0, target)
            # whatever mode the caller is in: gradients are taken, and 16 bits are where the config has them
            exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
            with torch.inference_mode(False), torch.autocast(self.device.type, enabled=False), exact:
                return self._adapt(target, batches, watch)

        return adapt_one

    def trunk(self, images: Tensor, *, exact: bool) -> Tensor:
        """Features at stride 8 in the tail's dtype; exact: in float32, as maps need it and gradients do not."""
        images = images.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
        reduced = not exact and self.dtype != torch.float32
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype, enabled=reduced):
            return self.model.trunk(images).to(self.dtype)

    def layout(self, own, others) -> Layout:
        """Of views and other images of these sizes at stride 8; kept, since images come in few sizes."""
        key = (tuple(own), tuple(others))
        if key not in self._layouts:
            if len(self._layouts) >= 64:
                self._layouts.pop(next(iter(self._layouts)))
            canvas = Canvas(*key, tensorflow_padding=self.tail.tensorflow_padding, device=self.device)
            self._layouts[key] = Layout(canvas, self.config, self.dtype, self.device)
        return self._layouts[key]

    def _adapt(self, target: Target, batches: "Batches | None", watch) -> Result:
        if not target.classes:
            return Result([], 0, False, error="no class is present")
        config, run = self.config, self.run
        views = [view for pair in target.views for view in self.trunk(pair, exact=True)]
        anchor = batches.anchor(run) if batches is not None and config.steps > 1 else None
        mixes = batches is not None and not config.anchored and config.steps > 2
        layout = self.layout([tuple(view.shape[1:]) for view in views], batches.sizes() if mixes else [])
        features = layout.canvas.empty(views[0].shape[0], self.dtype)
        for number, view in enumerate(views):
            layout.canvas.write(features, number, view)
        own_part = layout.canvas.part(features)
        sums = torch.zeros(self.n_classes, layout.canvas.own_rows * layout.canvas.columns, device=self.device)
        present = torch.zeros(self.n_classes, dtype=torch.bool, device=self.device)
        present[target.classes] = True
        run.start(present)
        for step in range(config.steps):
            last = step == config.steps - 1  # its update would serve no map, nor do its others
            canvas, labels = own_part, None
            if mixes and step > 0 and not last:
                others, labels = batches.step(step)
                for number, other in enumerate(others, len(views)):
                    layout.canvas.write(features, number, other)
                canvas = features
            with torch.set_grad_enabled(not last):
                loss = run.observe(canvas, layout, sums, labels)
            if watch is not None:
                watch(step, layout.maps(sums))
            if last or not run.alive:
                break
            run.update(loss, anchor if step == 0 or config.anchored else None)
        steps, keys = int(run.steps), sorted(target.classes)
        if not run.finite or not sums.isfinite().all():
            return Result([], steps, False, keys, error=f"loss or maps are not finite at step {steps - 1}")
        maps = layout.maps(sums)
        cam, high_res = merge_cams([m[None] for m in maps], keys, target.size)
        return Result(maps, steps, not bool(run.alive), keys, cam, high_res)

    def _check_target(self, number: int, target: Target) -> None:
        def need(holds, expected, got):
            if not holds:
                raise ValueError(f"adapt: expected target {number} to have {expected}, got {got}")

        scales = self.config.scales
        need(len(target.views) == len(scales), f"one pair of views for each scale of {scales}", len(target.views))
        height, width = target.size
        for scale, view in zip(scales, target.views, strict=True):
            shape = tuple(view.shape)
            need(view.ndim == 4 and shape[:2] == (2, 3), f"views (2, 3, h, w), at scale {scale}", shape)
            need(view.is_floating_point(), f"normalised views, at scale {scale}", view.dtype)
            fits = abs(shape[2] - height * scale) <= 1 and abs(shape[3] - width * scale) <= 1
            expected = f"a view of {height}x{width} times {scale}, within a pixel"
            need(fits, expected, f"{shape[2]}x{shape[3]}; give views in the order of the config's scales")
        good = all(isinstance(c, int) and 0 <= c < self.n_classes for c in target.classes)
        need(good, f"classes from 0 to {self.n_classes - 1}, the classifier's", target.classes)
        need(len(set(target.classes)) == len(target.classes), "each class once", target.classes)


class Batches:
    """The other images of a call of `adapt`: asked for once a step, their features computed once for all targets."""

    def __init__(self, engine: Engine, classes: Iterable[int], others: Others, shared: bool):
        self.engine, self.others, self.classes, self.shared = engine, others, set(classes), shared
        self._steps, self._shape, self._anchor = {}, None, None

    def sizes(self) -> list[tuple[int, int]]:
        """Of the features of a step, at stride 8."""
        shape = self.step(1)[0].shape
        return [tuple(shape[2:])] * shape[0]

    def step(self, step: int) -> tuple[Tensor, Tensor]:
        """(features (B, channels, h, w), present (B, C))."""
        if step not in self._steps:
            images, present = self.others(step)
            self._check(step, images, present)
            self._steps[step] = self.engine.trunk(images, exact=False), present.to(self.engine.device)
        if not self.shared:
            self._steps = {later: found for later, found in self._steps.items() if later >= step}
        return self._steps[step]

    def anchor(self, run: Run) -> list[Tensor]:
        """The gradients of others at theta_0, which is where every target stands at its first step: computed once.

        Leaves run at theta_0.
        """
        if self._anchor is None:
            run.weights.reset()
            batches = self.engine.config.anchor_batches if self.engine.config.anchored else 1
            found = [self._gradients(step, run) for step in range(batches)]
            means = (sum(part.float() for part in parts) / batches for parts in zip(*found, strict=True))
            self._anchor = [mean.to(self.engine.dtype) for mean in means]
        return self._anchor

    def _gradients(self, step: int, run: Run) -> list[Tensor]:
        engine, (features, present) = self.engine, self.step(step)
        canvas = Canvas([], [features.shape[2:]] * len(features), tensorflow_padding=engine.tail.tensorflow_padding)
        on_canvas = canvas.empty(features.shape[1], engine.dtype).to(engine.device)
        for number, image in enumerate(features):
            canvas.write(on_canvas, number, image)
        rows = Rows([canvas.cells(i) for i in range(len(features))], engine.device)
        masks = [mask.to(engine.device) for mask in canvas.masks(own=False, dtype=engine.dtype)]
        self._steps.pop(step)  # no other step has these images
        logits = rows.pool(engine.tail(on_canvas, masks, run.weights).float(), engine.config)
        return run.weights.gradients(run.loss(torch.where(present, logits, 0)), scale=run.scale)

    def _check(self, step: int, images: Tensor, present: Tensor) -> None:
        def need(holds, expected, got):
            if not holds:
                raise ValueError(f"adapt: expected others({step}) to give {expected}, got {got}")

        def said(value):
            return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

        good = isinstance(images, Tensor) and images.is_floating_point() and images.ndim == 4 and images.shape[1] == 3
        need(good, "normalised images (B, 3, h, w)", said(images))
        need(len(images) > 0, "at least one image (others=None for none at all)", "none")
        wanted = (len(images), self.engine.n_classes)
        good = isinstance(present, Tensor) and present.dtype == torch.bool and present.shape == wanted
        need(good, f"present as a bool tensor {wanted}", said(present))
        self._shape = self._shape or images.shape
        need(images.shape == self._shape, f"as many images of one size as at other steps, {tuple(self._shape)}",
             tuple(images.shape))  # fmt: skip
        if self.engine.config.disjoint:
            for c in present.any(0).nonzero().flatten().tolist():
                advice = "draw images that share no class with any target, or set disjoint=False"
                need(c not in self.classes, f"no image of class {c}, which a target has",
                     f"image {present[:, c].nonzero()[0].item()}; {advice}")  # fmt: skip


def best_precision(device: torch.device) -> str:
    """The 16-bit type that the device multiplies fast, else float32."""
    if device.type == "cuda":
        return "float16"
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if device.type == "cpu" and fast else "float32"
