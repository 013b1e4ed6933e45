"""The information bottleneck on drawn images: where layers respond, where the logit does, what L_RIB gives back.

Every image holds a digit, which says its class; some hold their class's motif too, a small diamond or square. A
network learns to tell the classes and needs the digit alone. G_k is the gradient, with respect to the image, of the sum
of layer k's outputs, at the last layer of the logit of the image's class. A region's HGR_k is the share of its pixels
whose abs(G_k) is above THRESHOLD of its maximum over the image, as a mean over images.
"""

import csv
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import files

log = logging.getLogger("ribfast")
TABLE, FIGURE = "toy.csv", "toy.png"
CLASSES = 2
REGIONS = ("digit", "motif", "background")
LOSSES = ("rib", "bce")
LAYERS = 6  # five convolutions and the logits
THRESHOLD = 0.3
_FONTS = (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_COMPLEX, cv2.FONT_HERSHEY_TRIPLEX)
_GAP = 2  # pixels at least between a digit and a motif


@dataclass(frozen=True)
class ToyConfig:
    seeds: tuple[int, ...] = (0, 1, 2)  # each one draws images and trains a network of its own
    images: int = 100  # unseen ones, all with digit and motif, that are measured and adapted to
    training_images: int = 2000  # drawn for training
    motif_share: float = 0.1  # of the training images hold their class's motif
    digits: str = "69"  # of the two classes; the first one's motif is the diamond
    size: int = 40  # side of the images
    motif: int = 3  # a motif is 2 * motif + 1 pixels wide
    noise: float = 0.03  # standard deviation of what is added to all pixels; digits and motifs are 1, the rest 0
    width: int = 16  # channels of the convolutions
    strides: tuple[int, int, int, int, int] = (1, 2, 1, 2, 1)  # of the convolutions
    epochs: int = 5  # passes over the training images
    batch: int = 32  # images a step of the training
    lr: float = 0.001  # of the training, by Adam
    steps: int = 10  # updates of an image's own copy of the weights
    adapt_lr: float = 2e-4  # of these updates, plain gradient descent
    margin: float = 100.0  # L_RIB = -min(margin, logit of the image's class)

    def __post_init__(self):
        for name in ("images", "training_images", "width", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"ToyConfig: expected {name} of at least 1, got {getattr(self, name)}")
        if not self.seeds or min(self.seeds) < 0 or len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"ToyConfig: expected seeds of at least 0, each once, got {self.seeds}")
        if len(self.digits) != CLASSES or len({*self.digits} & {*"0123456789"}) != CLASSES:
            raise ValueError(f"ToyConfig: expected two different digits, got {self.digits!r}")
        if not 0 <= self.motif_share <= 1:
            raise ValueError(f"ToyConfig: expected motif_share from 0 to 1, got {self.motif_share}")
        if self.size < 32 or not 2 <= self.motif <= self.size // 10:
            raise ValueError(f"ToyConfig: expected size of at least 32 and motif from 2 to a tenth of it, got "
                             f"{self.size} and {self.motif}")  # fmt: skip
        if min(self.strides) < 1 or self.steps < 0:
            raise ValueError(f"ToyConfig: expected strides of at least 1 and steps of at least 0, got {self.strides} "
                             f"and {self.steps}")  # fmt: skip
        for name in ("noise", "lr", "adapt_lr", "margin"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"ToyConfig: expected {name} of at least 0, got {getattr(self, name)}")


class Drawn(NamedTuple):
    pixels: Tensor  # (N, 1, size, size) float32
    labels: Tensor  # (N,) 0 or 1, in turns
    regions: Tensor  # (REGIONS, N, size, size) bool


class Measured(NamedTuple):
    """Of one seed. The maps are of the images that were measured, each divided by its maximum."""

    drawn: Drawn
    accuracy: float  # of the trained network on these images
    layers: Tensor  # (LAYERS, REGIONS) HGR of the trained network
    steps: dict[str, Tensor]  # by loss: (steps + 1, REGIONS) HGR of G_6, before the updates and after each
    layer_maps: Tensor  # (LAYERS, N, size, size)
    adapted_maps: dict[str, Tensor]  # by loss: (N, size, size) G_6 after the last update


def draw(config: ToyConfig, count: int, motif_share: float, rng: np.random.Generator) -> Drawn:
    """Digits at random places, of random fonts, heights, slants and widths of line; motifs where they touch no digit.

    A pixel is the digit's or the motif's where that is drawn at over half of its brightness, and background where
    nothing is drawn; what remains, the smoothed edge, belongs to no region.
    """
    size = config.size
    pixels, motifs = np.zeros((2, count, size, size), np.uint8)
    labels = np.arange(count) % 2
    for i in range(count):
        wanted = rng.random() < motif_share
        place = None
        while place is None:
            pixels[i] = _draw_digit(config.digits[labels[i]], size, rng)
            place = _free_place(pixels[i], 2 * config.motif + 1, rng)
        if wanted:
            _paste(motifs[i], _draw_motif(labels[i], config.motif), *place)
    drawn = np.maximum(pixels, motifs)
    regions = np.stack([pixels > 127, motifs > 127, drawn == 0])
    noise = config.noise * rng.standard_normal(drawn.shape, np.float32)
    images = torch.from_numpy(drawn / np.float32(255) + noise)
    return Drawn(images[:, None], torch.from_numpy(labels), torch.from_numpy(regions))


def _draw_digit(digit: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size) uint8"""
    font, unit = _FONTS[rng.integers(len(_FONTS))], size / 40
    thickness = max(1, round(rng.uniform(1.5, 3.5) * unit))
    (width, height), _ = cv2.getTextSize(digit, font, unit, thickness)
    canvas = np.zeros((size, size), np.uint8)
    start = ((size - width) // 2, (size + height) // 2)
    cv2.putText(canvas, digit, start, font, unit, 255, thickness, cv2.LINE_AA)
    scale, slant, angle = rng.uniform(0.8, 1.1), rng.uniform(-0.3, 0.3), rng.uniform(-0.15, 0.15)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix, centre = scale * np.array([[1, slant], [0, 1]]) @ turn, np.full(2, size / 2)
    canvas = cv2.warpAffine(canvas, np.column_stack([matrix, centre - matrix @ centre]), (size, size))
    x, y, width, height = cv2.boundingRect(canvas)
    moved = np.zeros_like(canvas)
    _paste(moved, canvas[y : y + height, x : x + width], int(rng.integers(size - height + 1)),
           int(rng.integers(size - width + 1)))  # fmt: skip
    return moved


def _draw_motif(label: int, radius: int) -> np.ndarray:
    """A filled diamond, or a filled square of about its area."""
    far = np.abs(np.arange(-radius, radius + 1))
    inside = np.add.outer(far, far) <= radius if label == 0 else np.maximum.outer(far, far) <= round(0.7 * radius)
    return inside.astype(np.uint8) * 255


def _free_place(digit: np.ndarray, side: int, rng: np.random.Generator) -> tuple[int, int] | None:
    """A corner (y, x) of a random square within the image that keeps its distance from the digit, if there is one."""
    sums = cv2.integral(cv2.dilate(digit, np.ones((2 * _GAP + 1,) * 2, np.uint8)))
    taken = sums[side:, side:] - sums[side:, :-side] - sums[:-side, side:] + sums[:-side, :-side]
    places = np.argwhere(taken == 0)
    return tuple(map(int, places[rng.integers(len(places))])) if len(places) else None


def _paste(canvas: np.ndarray, part: np.ndarray, y: int, x: int) -> None:
    canvas[y : y + part.shape[0], x : x + part.shape[1]] = part


class ToyNetwork(nn.Module):
    """Five convolutions of 3x3 with ReLU, the mean over positions, a linear layer: (N, 1, H, W) -> logits (N, 2)."""

    def __init__(self, width: int = 16, strides: tuple[int, ...] = (1, 2, 1, 2, 1)):
        super().__init__()
        channels = pairwise([1, *[width] * len(strides)])
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, s, 1) for (a, b), s in zip(channels, strides, strict=True))
        self.linear = nn.Linear(width, CLASSES)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def layers(self, x: Tensor) -> list[Tensor]:
        """What comes out of each convolution's ReLU, and the logits."""
        outputs = []
        for conv in self.convs:
            outputs.append(x := F.relu(conv(x)))
        return [*outputs, self.linear(x.mean((2, 3)))]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[-1]


def train(
    drawn: Drawn, config: ToyConfig, seed: int, progress: Callable[[int], None] = lambda epoch: None
) -> ToyNetwork:
    """By BCE on both logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ToyNetwork(config.width, config.strides)
        optimizer, targets = torch.optim.Adam(network.parameters(), config.lr), _targets(drawn.labels)
        for epoch in range(config.epochs):
            for batch in torch.randperm(len(targets)).split(config.batch):
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(network(drawn.pixels[batch]), targets[batch]).backward()
                optimizer.step()
            progress(epoch + 1)
    return network.requires_grad_(False)


def _targets(labels: Tensor) -> Tensor:
    return F.one_hot(labels, CLASSES).float()


def gradient_maps(network: ToyNetwork, pixels: Tensor, labels: Tensor) -> Tensor:
    """(LAYERS, N, H, W): abs(G_k) of every layer, by one forward pass and one batch of vector-Jacobian products."""
    pixels = pixels.detach().requires_grad_()
    *convolutions, logits = network.layers(pixels)
    sums = torch.stack([*(output.sum() for output in convolutions), (logits * _targets(labels)).sum()])
    (maps,) = torch.autograd.grad(sums, pixels, torch.eye(len(sums)), is_grads_batched=True)
    return maps[:, :, 0].abs()


def hgr(maps: Tensor, regions: Tensor) -> Tensor:
    """Maps (..., N, H, W), regions (R, N, H, W) -> (..., R)."""
    high = (maps > THRESHOLD * maps.amax((-1, -2), keepdim=True)).unsqueeze(-4)
    shares = (high & regions).sum((-1, -2)) / regions.sum((-1, -2))
    return shares.mean(-1)


def adapt(
    network: ToyNetwork, pixels: Tensor, labels: Tensor, loss: str, config: ToyConfig,
    progress: Callable[[int], None] = lambda step: None,
) -> Tensor:  # fmt: skip
    """(steps + 1, N, H, W): abs(G_6) of each image by a copy of the weights of its own, before and after each update.

    The copies are updated together, by gradient descent on L_RIB of the image ("rib") or on its BCE ("bce").
    """

    def forward(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(network, weights, (image[None],))[0]

    def logit(image: Tensor, weights: dict[str, Tensor], target: Tensor) -> Tensor:
        return (forward(weights, image) * target).sum()

    def objective(weights: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        if loss == "rib":
            return -logit(image, weights, target).clamp(max=config.margin)
        return F.binary_cross_entropy_with_logits(forward(weights, image), target)

    if loss not in LOSSES:
        raise ValueError(f"adapt: expected a loss of {', '.join(LOSSES)}, got {loss!r}")
    slopes, updates = torch.func.vmap(torch.func.grad(logit)), torch.func.vmap(torch.func.grad(objective))
    weights = {name: value.detach().expand(len(pixels), *value.shape) for name, value in network.named_parameters()}
    targets, maps = _targets(labels), []
    for step in range(config.steps + 1):
        maps.append(slopes(pixels, weights, targets)[:, 0].abs())
        if not maps[-1].isfinite().all():
            raise ValueError(
                f"adapt: expected finite gradients, got others after update {step} of {loss}; lower adapt_lr"
            )
        if step < config.steps:
            gradients = updates(weights, pixels, targets)
            weights = {name: value - config.adapt_lr * gradients[name] for name, value in weights.items()}
        progress(step)
    return torch.stack(maps)


def measure(config: ToyConfig, seed: int, progress: Callable[[int, str], None] = lambda done, text: None) -> Measured:
    """Draws, trains, measures, adapts. progress: what is done of `effort(config)`."""
    rng = np.random.default_rng(seed)
    training = draw(config, config.training_images, config.motif_share, rng)
    drawn = draw(config, config.images, 1.0, rng)
    network = train(training, config, seed, lambda epoch: progress(epoch, f"seed {seed}: training"))
    accuracy = (network(drawn.pixels).argmax(1) == drawn.labels).float().mean().item()
    maps = gradient_maps(network, drawn.pixels, drawn.labels)
    steps, adapted = {}, {}
    for number, loss in enumerate(LOSSES):
        before = config.epochs + number * (config.steps + 1)

        def report(step: int, before: int = before, loss: str = loss) -> None:
            progress(before + step + 1, f"seed {seed}: {loss}")

        each = adapt(network, drawn.pixels, drawn.labels, loss, config, report)
        steps[loss], adapted[loss] = hgr(each, drawn.regions), _normalized(each[-1])
    return Measured(drawn, accuracy, hgr(maps, drawn.regions), steps, _normalized(maps), adapted)


def effort(config: ToyConfig) -> int:
    """Parts that a seed's progress is counted in."""
    return config.epochs + len(LOSSES) * (config.steps + 1)


def _normalized(maps: Tensor) -> Tensor:
    return maps / maps.amax((-1, -2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def run(
    config: ToyConfig, out: str | Path, *, progress: Callable[[int, int, str], None] | None = None
) -> dict[int, Measured]:
    """Measures every seed and writes out/toy.csv and out/toy.png."""
    from . import toy_figure  # which draws what is measured here

    out, found = Path(out), {}
    for name in (TABLE, FIGURE):
        (out / name).unlink(missing_ok=True)  # another configuration's would lie beside this one's config.json
    for number, seed in enumerate(config.seeds):

        def report(done: int, text: str, number: int = number) -> None:
            if progress is not None:
                progress(number * effort(config) + done, len(config.seeds) * effort(config), text)

        found[seed] = measure(config, seed, report)
        log.info("seed %d: %.1f %% of the images are told right", seed, 100 * found[seed].accuracy)
    files.write(out / TABLE, table(found).encode())
    files.write(out / FIGURE, toy_figure.encode(toy_figure.draw(found)))
    return found


def table(found: dict[int, Measured]) -> str:
    """CSV, long: HGR of every region by seed, at every layer (what: layer, index: 1 to 6), at every step of a loss."""
    rows = [("seed", "what", "index", "loss", "region", "hgr")]
    for seed, measured in found.items():
        parts = [("layer", 1, "", measured.layers)]
        parts += [("step", 0, loss, measured.steps[loss]) for loss in LOSSES]
        for what, first, loss, values in parts:
            for index, shares in enumerate(values.tolist(), first):
                rows += [(seed, what, index, loss, name, f"{x:.4f}") for name, x in zip(REGIONS, shares, strict=True)]
    csv.writer(text := io.StringIO(), lineterminator="\n").writerows(rows)
    return text.getvalue()
