"""Adapting images: what is prepared once for many."""

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import lacks_memory
from ..models import CamClassifier
from . import modes
from .batches import Batches, Others
from .canvas import Canvas
from .config import RIBConfig
from .job import Job, Result, Target
from .memory import keep_pages
from .slots import Slot, capture_graph, out_of_memory, schedule
from .step import Layout, Rows
from .tail import Tail

log = logging.getLogger("ribfast")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def adapt(
    model: CamClassifier, targets: Sequence[Target], others: Others | None, config: RIBConfig | None = None
) -> list[Result]:
    """Adapts the model to each target by itself and sums its maps along the way; the model stays as it is.

    others(step) -> images (B, 3, h, w), present (B, C) bool: the other images of a step, the same for all targets
    of one call. It is called once for each step that uses them, in order, and again, for the same images, where targets
    begin anew since memory ran out or float16 did not hold them. None: no other images.
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
        self.dtype = DTYPES[resolve_precision(config.precision, self.device)]
        self.tail = Tail(model, self.dtype)
        self.channels = self.tail.start[0][0].shape[1]  # of the trunk's features
        # what makes a graph of a step, or None: steps are run one operation after another
        self.capture = capture_graph if self.device.type == "cuda" and config.graphs else None
        self._slots, self._layouts, self._layouts_of_others, self._wider = [], {}, {}, None

    def adapt(self, targets: Sequence[Target], others: Others | None) -> list[Result]:
        targets = list(targets)
        if not targets:
            raise ValueError("adapt: expected at least one target, got an empty list")
        for number, target in enumerate(targets):
            self._check_target(number, target)
        batches = self.batches([c for target in targets for c in target.classes], others, len(targets))
        results = [None] * len(targets)
        with keep_pages():
            for job, result in self.adapt_all(Job(target, batches, i) for i, target in enumerate(targets)):
                results[job.tag] = result
        return results

    def batches(self, classes: Iterable[int], others: Others | None, users: int) -> Batches | None:
        """The others of so many targets, of these classes, that share them."""
        return None if others is None else Batches(self, classes, others, users)

    def adapt_all(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
        """Each job with its result as it is done, which may be in another order; jobs are asked for as there is room.

        An image that float16 does not hold is adapted in bfloat16.
        """

        def checked():
            for number, job in enumerate(jobs):
                self._check_target(number, job.target)
                yield job

        late = []
        for job, result in schedule(self, checked()):
            if self.dtype == torch.float16 and result.error is not None and "not finite" in result.error:
                log.info("an image of %dx%d does not fit float16: adapted in bfloat16", *job.target.size)
                wider = self._in_bfloat16(job)
                if wider is None:  # no memory beside the slots
                    late.append(job)
                    continue
                result = wider
            yield job, result
        if late:
            self._slots = []
        for job in late:
            yield job, self._in_bfloat16(job) or out_of_memory(job)

    def trunk(self, images: Tensor, *, exact: bool) -> Tensor:
        """Features at stride 8 in the tail's dtype; exact: in float32, as maps need it and gradients do not."""
        reduced = not exact and self.dtype != torch.float32
        mode = torch.autocast(self.device.type, self.dtype, enabled=reduced, cache_enabled=False)
        with modes.plain(self.device), torch.no_grad(), mode:
            images = images.to(self.device, torch.float32, non_blocking=True)
            return self.model.trunk(images.contiguous(memory_format=torch.channels_last)).to(self.dtype)

    def mixes(self, job: Job) -> bool:
        """Whether others lie on the canvas beside the target's views."""
        return job.batches is not None and not self.config.anchored and self.config.steps > 2

    @torch.inference_mode(False)
    def layout_of(self, job: Job) -> Layout:
        """Where a target's features and those of its others lie; kept, since images come in few sizes."""
        own = tuple((-(-view.shape[2] // 8), -(-view.shape[3] // 8)) for view in job.target.views for _ in range(2))
        key = own, tuple(job.batches.sizes() if self.mixes(job) else [])
        if key not in self._layouts:
            if len(self._layouts) >= 64:
                self._layouts.pop(next(iter(self._layouts)))
            few = self.capture is not None
            canvas = Canvas(*key, tensorflow_padding=self.tail.tensorflow_padding, few_shapes=few)
            self._layouts[key] = Layout(canvas, self.config, self.dtype, self.device)
        return self._layouts[key]

    @torch.inference_mode(False)
    def layout_of_others(self, sizes: tuple) -> tuple[Canvas, Rows, list[Tensor]]:
        """A canvas of others alone, their rows and its masks."""
        if sizes not in self._layouts_of_others:
            canvas = Canvas([], sizes, tensorflow_padding=self.tail.tensorflow_padding)
            cells = [canvas.cells(i) for i in range(len(sizes))]
            rows = Rows(cells, canvas.rows * canvas.columns, self.device)
            masks = [mask.to(self.device) for mask in canvas.masks(self.dtype)]
            self._layouts_of_others[sizes] = canvas, rows, masks
        return self._layouts_of_others[sizes]

    def take_slots(self) -> list[Slot]:
        """Those of earlier calls."""
        slots, self._slots = self._slots, []
        return slots

    def give_slots(self, slots: list[Slot]) -> None:
        self._slots = slots

    def free_memory(self) -> float:
        """Bytes that slots may take in addition to what they hold."""
        if self.device.type != "cuda":
            return math.inf
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return 0.85 * (torch.cuda.mem_get_info(self.device)[0] + kept)

    def _in_bfloat16(self, job: Job) -> Result | None:
        """None where there is no memory for it."""
        try:
            if self._wider is None:
                changes = {"precision": "bfloat16", "concurrency": 1, "graphs": False}
                self._wider = Engine(self.model, dataclasses.replace(self.config, **changes))
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            return None
        batches = None if job.batches is None else job.batches.elsewhere(self._wider)
        ((_, result),) = schedule(self._wider, [dataclasses.replace(job, batches=batches)])
        return None if result.lacks_memory else result

    def _check_target(self, number: int, target: Target) -> None:
        def need(holds, expected, got):
            if not holds:
                raise ValueError(f"adapt: expected target {number} to have {expected}, got {got}")

        scales = self.config.scales
        need(len(target.views) == len(scales), f"one pair of views for each scale of {scales}", len(target.views))
        height, width = target.reduced or target.size
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


def resolve_precision(precision: str, device: torch.device) -> str:
    """What auto stands for: the 16-bit type that the device multiplies fast, else float32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "float16"
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if device.type == "cpu" and fast else "float32"
