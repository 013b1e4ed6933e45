"""The other images of targets that share them: asked for once a step, their features computed once for all."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .step import Run

Others = Callable[[int], tuple[Tensor, Tensor]]


class Batches:
    """What `others` gives, as the steps need it.

    users: how many targets share them. What all have had is let go, and asked for again where a target begins anew.
    """

    def __init__(self, engine, classes: Iterable[int], others: Others, users: int):
        self.engine, self.others, self.classes, self.users = engine, others, set(classes), users
        self.token = object()  # stands for these batches where they need not be kept
        self._steps, self._takers, self._shape, self._anchor, self._elsewhere = {}, {}, None, None, None
        self._home = torch.cuda.current_stream(engine.device) if engine.device.type == "cuda" else None

    def sizes(self) -> list[tuple[int, int]]:
        """Of the features of a step, at stride 8."""
        if self._shape is None:
            self._features(0)
        count, _, height, width = self._shape
        return [(-(-height // 8), -(-width // 8))] * count

    def step(self, step: int) -> tuple[Tensor, Tensor]:
        """(features (B, channels, h, w), present (B, C))."""
        found = self._features(step)
        self._takers[step] += 1
        if self._takers[step] >= self.users:
            del self._steps[step]
        return found

    def anchor(self, run: Run) -> list[Tensor]:
        """The gradients of others at theta_0, which is where every target stands at its first step: computed once."""
        if self._anchor is None:
            run.weights.reset()
            batches = self.engine.config.anchor_batches if self.engine.config.anchored else 1
            found = [self._gradients(step, run) for step in range(batches)]
            means = [sum(part.float() for part in parts) / batches for parts in zip(*found, strict=True)]
            like = run.weights.leaves
            self._anchor = Shared(*(mean.to(leaf.dtype) for mean, leaf in zip(means, like, strict=True)))
        return list(self._anchor.take())

    def elsewhere(self, engine) -> "Batches":
        """The same others for another engine."""
        if self._elsewhere is None:
            self._elsewhere = Batches(engine, self.classes, self.others, self.users)
        return self._elsewhere

    def _features(self, step: int) -> tuple[Tensor, Tensor]:
        if step not in self._steps:
            device = self.engine.device
            images, present = self._ask(step)
            self._check(step, images, present)
            features = self.engine.trunk(images, exact=False)
            self._steps[step], self._takers[step] = Shared(features, present.to(device, non_blocking=True)), 0
        return self._steps[step].take()

    def _ask(self, step: int) -> tuple[Tensor, Tensor]:
        """On the caller's stream, whose tensors may live no longer than their last name."""
        if self._home is None:
            return self.others(step)
        here = torch.cuda.current_stream(self.engine.device)
        with torch.cuda.stream(self._home):
            images, present = self.others(step)
        here.wait_stream(self._home)
        for tensor in (images, present):
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                tensor.record_stream(here)
        return images, present

    def _gradients(self, step: int, run: Run) -> list[Tensor]:
        engine, (features, present) = self.engine, self._features(step)
        canvas, rows, masks = engine.layout_of_others(tuple(self.sizes()))
        on_canvas = canvas.empty(features.shape[1], engine.dtype, engine.device)
        for number, image in enumerate(features):
            canvas.write(on_canvas, number, image)
        del self._steps[step]  # no other step has these images
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


class Shared:
    """Tensors that are made on one stream of a device and read on others."""

    def __init__(self, *tensors: Tensor):
        self.tensors, self.made = tensors, None
        if tensors[0].is_cuda:
            self.made = torch.cuda.current_stream(tensors[0].device).record_event()

    def take(self) -> tuple[Tensor, ...]:
        """Ready for the current stream."""
        if self.made is not None:
            stream = torch.cuda.current_stream(self.tensors[0].device)
            stream.wait_event(self.made)
            for tensor in self.tensors:
                tensor.record_stream(stream)
        return self.tensors
