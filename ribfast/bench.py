"""The operators on this machine: how many times faster than the specification in plain torch, and how far from it."""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from . import _ext, ops, reference
from .processes import choose_device

SCALES = (1.0, 0.5, 1.5, 2.0)
Operator = Literal[
    "gndrp", "accumulate_cams", "normalize_cams", "threshold_histogram", "confusion_matrix", "path_affinity",
    "random_walk", "pair_losses", "segmentation_loss", "erase", "refine", "dense_crf", "dense_crf_labels",
]  # fmt: skip


@dataclass(frozen=True)
class BenchConfig:
    operators: tuple[Operator, ...] = get_args(Operator)  # those that are measured
    classes: int = 20  # classes of maps, beside the background
    height: int = 375  # of photographs; what the specification takes long for is measured at a fraction of it
    width: int = 500  # of photographs
    seconds: float = 1.0  # for each operator and for what it is compared with, at least
    threads: int | None = None  # of torch; none: as many as it takes
    seed: int = 0  # of what they are given
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def __post_init__(self):
        for name, value in {"classes": 1, "height": 32, "width": 32, "seed": 0, "threads": 1}.items():
            if getattr(self, name) is not None and getattr(self, name) < value:
                raise ValueError(f"BenchConfig: expected {name} of at least {value}, got {getattr(self, name)}")
        if not 0 < self.seconds < 3600:
            raise ValueError(f"BenchConfig: expected seconds above 0, got {self.seconds}")


class Case(NamedTuple):
    """What is timed: the operator, and the specification given the same."""

    what: str
    ours: Callable[[], Tensor]
    plain: Callable[[], Tensor]


class Row(NamedTuple):
    operator: str
    what: str
    backend: str
    milliseconds: float  # of the operator, the median
    times_faster: float  # than plain torch in the same run, the median of pairs
    difference: float  # the largest, of results as large as `scale`
    scale: float


def run(
    config: BenchConfig, progress: Callable[[int, int, str], None] | None = None
) -> tuple[dict[str, str | int], list[Row]]:
    """(the machine, a row an operator)"""
    device, before = choose_device(config.device), torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        rows = []
        if progress is not None:
            progress(0, len(config.operators), "")
        for done, name in enumerate(config.operators, 1):
            rows.append(_measure(name, config, device))
            if progress is not None:
                progress(done, len(config.operators), name)
        return machine(device), rows
    finally:
        torch.set_num_threads(before)


def machine(device: torch.device) -> dict[str, str | int]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "tier": _ext.cpu_tier(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def _measure(name: str, config: BenchConfig, device: torch.device) -> Row:
    generator = torch.Generator().manual_seed(config.seed)
    case = _CASES[name](config, lambda *shape: torch.rand(shape, generator=generator).to(device))
    ours, plain = case.ours().double(), case.plain().double()
    difference, scale = (ours - plain).abs().max().item(), plain.abs().max().item()
    pairs, spent = [], [0.0, 0.0]
    while min(spent) < config.seconds and (len(pairs) < 3 or sum(spent) < 20 * config.seconds):
        pairs.append((_seconds(case.plain, device), _seconds(case.ours, device)))
        spent = [sum(side) for side in zip(*pairs, strict=True)]
    served, _ = _ext.backend(_SERVED.get(name, name), device)
    median = statistics.median(own for _, own in pairs)
    faster = statistics.median(other / own for other, own in pairs)
    return Row(name, case.what, served, 1000 * median, faster, difference, scale)


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Of one call, launches included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _gradients(maps: Tensor, run: Callable[[Tensor], Tensor], grad: Tensor | None = None) -> Callable[[], Tensor]:
    """Forward and backward; gives the gradients."""

    def call() -> Tensor:
        leaf = maps.detach().requires_grad_()
        (found,) = torch.autograd.grad(run(leaf), leaf, grad)
        return found

    return call


def _sides(config: BenchConfig, parts: int) -> tuple[int, int]:
    return -(-config.height // parts), -(-config.width // parts)


def _gndrp(c: BenchConfig, rand) -> Case:
    shape = (8, c.classes, *_sides(c, 12))
    maps, present, grad = rand(*shape) - 0.5, rand(*shape[:2]) < 0.2, rand(*shape[:2])
    ours, plain = (_gradients(maps, lambda m, op=op: op(m, present), grad) for op in (ops.gndrp, reference.gndrp))
    return Case(f"{shape}, forward and backward", ours, plain)


def _accumulate_cams(c: BenchConfig, rand) -> Case:
    size = c.height, c.width
    maps = [rand(2, c.classes, *(-(-round(side * scale) // 16) for side in size)) - 0.5 for scale in SCALES]
    padded = tuple(-(-side // 16) * 16 for side in size)
    ours, plain = (
        lambda op=op: op(maps, size, padded=padded) for op in (ops.accumulate_cams, reference.accumulate_cams)
    )
    return Case(f"{len(SCALES)} scales with mirrors, {c.classes} x {size[0]} x {size[1]}", ours, plain)


def _normalize_cams(c: BenchConfig, rand) -> Case:
    cams = rand(c.classes, c.height, c.width)
    ours, plain = (lambda op=op: op(cams) for op in (ops.normalize_cams, reference.normalize_cams))
    return Case(f"{tuple(cams.shape)}", ours, plain)


def _threshold_histogram(c: BenchConfig, rand) -> Case:
    maps, mask = rand(3, c.height, c.width), _labels(rand, 4, c.height, c.width)
    thresholds = torch.arange(0, 0.6, 0.02, device=maps.device)
    operators = ops.threshold_histogram, reference.threshold_histogram
    ours, plain = (lambda op=op: op(maps, mask, thresholds, 4) for op in operators)
    return Case(f"3 maps of {c.height} x {c.width}, 30 thresholds", ours, plain)


def _confusion_matrix(c: BenchConfig, rand) -> Case:
    found, mask = (_labels(rand, c.classes + 1, c.height, c.width) for _ in range(2))
    operators = ops.confusion_matrix, reference.confusion_matrix
    ours, plain = (lambda op=op: op(found, mask, c.classes + 1) for op in operators)
    return Case(f"{c.height} x {c.width}, {c.classes + 1} labels", ours, plain)


def _path_affinity(c: BenchConfig, rand) -> Case:
    boundary = rand(4, *_sides(c, 4))
    ours, plain = (
        lambda op=op: op(boundary, radius=5, beta=10.0) for op in (ops.path_affinity, reference.path_affinity)
    )
    return Case(f"{tuple(boundary.shape)}, radius 5", ours, plain)


def _random_walk(c: BenchConfig, rand) -> Case:
    """The specification's matrix has a side of as many cells as the map."""
    height, width = _sides(c, 16)
    cams, boundary = rand(2, height, width), rand(height, width)

    def plain() -> Tensor:
        return reference.random_walk(cams * (1 - boundary), reference.path_affinity(boundary[None], 5, 10.0)[0], 256)

    def ours() -> Tensor:
        return ops.random_walk(cams, boundary, beta=10, log2_steps=8, radius=5)

    return Case(f"2 maps of {height} x {width}, 256 steps", ours, plain)


def _pair_losses(c: BenchConfig, rand) -> Case:
    height, width = _sides(c, 4)
    boundary, displacement, labels = (
        rand(2, height, width),
        rand(2, 2, height, width),
        _labels(rand, 3, 2, height, width),
    )
    weights = rand(8)
    ours, plain = (_gradients(boundary, lambda m, op=op: (op(m, displacement, labels, 10) * weights).sum())
                   for op in (ops.pair_losses, reference.pair_losses))  # fmt: skip
    return Case(f"(2, {height}, {width}), radius 10, forward and backward", ours, plain)


def _segmentation_loss(c: BenchConfig, rand) -> Case:
    logits, labels = rand(2, c.classes + 1, *_sides(c, 8)) * 6, _labels(rand, c.classes + 1, 2, c.height, c.width)
    ours, plain = (_gradients(logits, lambda m, op=op: op(m, labels))
                   for op in (ops.segmentation_loss, reference.segmentation_loss))  # fmt: skip
    return Case(f"{tuple(logits.shape)} to {c.height} x {c.width}, forward and backward", ours, plain)


def _erase(c: BenchConfig, rand) -> Case:
    images, maps = rand(4, 3, c.height, c.width), rand(8, *_sides(c, 16)) - 0.3
    which = torch.arange(8, device=images.device) // 2
    ours, plain = (_gradients(maps, lambda m, op=op: op(images, m, which, sharpness=20.0, level=0.5)[0].sum())
                   for op in (ops.erase, reference.erase))  # fmt: skip
    return Case(f"{tuple(maps.shape)} on 4 x {c.height} x {c.width}, forward and backward", ours, plain)


def _refine(c: BenchConfig, rand) -> Case:
    images, maps = _photograph(c, rand).permute(2, 0, 1)[None].float(), rand(1, 4, c.height, c.width)
    ours, plain = (lambda op=op: op(images, maps, method="par") for op in (ops.refine, reference.refine))
    return Case(f"PAR, 4 maps of {c.height} x {c.width}", ours, plain)


def _dense_crf(c: BenchConfig, rand) -> Case:
    image = _photograph(c, rand, 3)
    unary = -(rand(4, *image.shape[:2]) * 3).softmax(0).log()

    def ours() -> Tensor:
        return ops.dense_crf(image[None], unary[None])[0]

    return Case(f"{image.shape[0]} x {image.shape[1]}, 4 labels", ours, lambda: reference.dense_crf(image, unary))


def _dense_crf_labels(c: BenchConfig, rand) -> Case:
    image = _photograph(c, rand, 3)
    labels = _labels(rand, 3, *(-(-side // 8) for side in image.shape[:2]))
    labels = (
        labels.repeat_interleave(8, 0).repeat_interleave(8, 1)[: image.shape[0], : image.shape[1]][None].contiguous()
    )

    def ours() -> Tensor:
        return ops.dense_crf_labels(image[None], labels[None], 3)[0]

    def plain() -> Tensor:
        return reference.dense_crf_labels(image, labels, 3)

    return Case(f"{image.shape[0]} x {image.shape[1]}, 3 labels", ours, plain)


def _labels(rand, count: int, *shape: int) -> Tensor:
    return (rand(*shape) * count).to(torch.uint8).clamp_(max=count - 1)


def _photograph(c: BenchConfig, rand, parts: int = 1) -> Tensor:
    """Something smooth with noise, which a CRF takes as long for as for a photograph."""
    size = _sides(c, parts)
    coarse = torch.nn.functional.interpolate(rand(1, 3, 12, 16) * 220, size, mode="bilinear")[0].permute(1, 2, 0)
    return (coarse + 12 * rand(*size, 3)).to(torch.uint8).contiguous()


_SERVED = {"segmentation_loss": "pixel_losses"}  # operators by the name of their kernel
_CASES = {
    "gndrp": _gndrp, "accumulate_cams": _accumulate_cams, "normalize_cams": _normalize_cams,
    "threshold_histogram": _threshold_histogram, "confusion_matrix": _confusion_matrix,
    "path_affinity": _path_affinity, "random_walk": _random_walk, "pair_losses": _pair_losses,
    "segmentation_loss": _segmentation_loss, "erase": _erase, "refine": _refine, "dense_crf": _dense_crf,
    "dense_crf_labels": _dense_crf_labels,
}  # fmt: skip
