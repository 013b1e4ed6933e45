"""What every operator computes, in plain torch: slow, obvious, differentiable. Kernels are compared with this file.

Sums are held in float32 (float64 for float64 maps), whatever the maps are stored in.
"""

import copy
import math

import torch
from torch import Tensor
from torch.nn import functional as F


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def gndrp(maps: Tensor, present: Tensor, tau: float = 0.4, *, divide_by: str = "kept", strict: bool = False) -> Tensor:
    """Global non-discriminative region pooling: the mean of T over U_tau = {u : T(u) / max T <= tau}.

    `strict` takes < for <=, `divide_by="all"` divides by |U| (the released code does both). Absent classes get the
    plain mean. An empty U_tau gives 0. A map that holds NaN gives NaN.
    """
    flat = maps.to(accumulator_dtype(maps.dtype)).flatten(2)
    top = flat.detach().amax(2, keepdim=True) + 0.0  # + 0.0: a maximum of -0.0 counts as 0.0
    level = flat.detach() / top
    kept = level < tau if strict else level <= tau
    kept = kept | top.isnan() | ~present[..., None]
    total = torch.where(kept, flat, 0).sum(2)
    count = kept.sum(2).clamp(min=1) if divide_by == "kept" else flat.shape[2]
    return torch.where(present, total / count, flat.mean(2))


def accumulate_cams(maps, size, *, padded=None, relu: bool = True, out: Tensor | None = None) -> Tensor:
    """Sum over scales and views of the upsampled maps, the mirrored view turned back, ReLU before everything.

    maps: over scales, (V, C, h, w), view 1 being the map of the mirrored image. Each is interpolated
    (bilinear, align_corners=False) to `padded` and cut to `size` at the top left.
    """
    height, width = size
    total = 0
    for scale in maps:
        views = scale.to(accumulator_dtype(scale.dtype))
        views = views.relu() if relu else views
        merged = views[0] + views[1].flip(-1) if len(views) == 2 else views[0]
        large = F.interpolate(merged[None], tuple(padded or size), mode="bilinear", align_corners=False)[0]
        total = total + large[:, :height, :width]
    return total if out is None else out.add_(total)


def normalize_cams(cams: Tensor, eps: float = 1e-5, *, inplace: bool = False) -> Tensor:
    """Each (H, W) map divided by its maximum plus eps."""
    values = cams.to(accumulator_dtype(cams.dtype))
    result = (values / (values.amax((-2, -1), keepdim=True) + eps)).to(cams.dtype)
    return cams.copy_(result) if inplace else result


def threshold_histogram(maps, mask, thresholds, n_labels, *, stride=1):
    """Pixels by true label, class of the largest map (the first of equals), and number of thresholds below that map."""
    if stride > 1:
        padded = stride * maps.shape[1], stride * maps.shape[2]
        maps = accumulate_cams([maps[None]], mask.shape, padded=padded, relu=False)
    maps, counted, bins = maps.float(), mask != 255, len(thresholds) + 1
    if maps.isnan().any():
        raise ValueError("threshold_histogram: expected maps without NaN, got some that hold it")
    if (mask[counted] >= n_labels).any():
        raise ValueError(
            f"threshold_histogram: expected labels in the mask below {n_labels} or 255, ignored, got others"
        )
    if not thresholds.isfinite().all() or (thresholds.diff() < 0).any():
        raise ValueError("threshold_histogram: expected finite thresholds that ascend, got others")
    if not len(maps):
        return maps.new_zeros((n_labels, 0, bins), dtype=torch.int64)
    best, winner = maps[0], torch.zeros_like(mask, dtype=torch.int64)
    for number, plane in enumerate(maps[1:], 1):
        winner = torch.where(plane > best, number, winner)
        best = torch.maximum(best, plane)
    below = torch.searchsorted(thresholds, best.contiguous())
    places = (mask.long() * len(maps) + winner) * bins + below
    counts = torch.bincount(places[counted], minlength=n_labels * len(maps) * bins)
    return counts.view(n_labels, len(maps), bins)


def confusion_matrix(labels, mask, n_labels):
    """Pixels by true and predicted label; rows true, 255 in the mask left out."""
    counted = mask != 255
    if (labels >= n_labels).any() or (mask[counted] >= n_labels).any():
        raise ValueError(f"confusion_matrix: expected labels below {n_labels} (255 in the mask: ignored), got others")
    places = mask[counted].long() * n_labels + labels[counted]
    return torch.bincount(places, minlength=n_labels**2).view(n_labels, n_labels)


def rib(model, views, classes, others, config):
    """RIB as it was released: one image, every step from its pixels on, the last update included though unused.

    views: (2, 3, h, w) at each of config.scales, the image and its mirror; others(step) -> images, present.
    Returns the summed maps (C, h, w) of each scale, the steps begun and whether a stop ended them.
    """
    model = copy.deepcopy(model)
    backbone, classifier = model.trained_parameters()
    groups = [{"params": backbone, "scale": 1.0}, {"params": classifier, "scale": config.classifier_lr_scale}]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=config.momentum, weight_decay=config.weight_decay)
    target = torch.zeros(1, len(classifier[0]), dtype=torch.bool, device=views[0].device)
    target[0, list(classes)] = True

    def pooled(maps, present):
        if config.pooling == "gap":
            return torch.where(present, maps.mean((2, 3)), 0)
        return torch.where(
            present, gndrp(maps, present, config.tau, divide_by=config.divide_by, strict=config.strict), 0
        )

    sums = [0] * len(views)
    for step in range(config.steps):
        rows = []
        for i, (scale, view) in enumerate(zip(config.scales, views, strict=True)):
            maps = model(view)
            rectified = maps.detach().relu()
            cam = rectified[0] + rectified[1].flip(-1)
            sums[i] = sums[i] + cam
            if scale == 1 and step > 0 and config.explode_area is not None:
                own = cam[target[0]]
                high = own / own.amax((1, 2), keepdim=True) > config.explode_level
                if high.any(0).float().mean() > config.explode_area:
                    return sums, step + 1, True
            if scale in config.loss_scales:
                rows.append(pooled(maps, target.expand(2, -1)))
        if config.stop_logit is not None and torch.cat(rows).sum().abs() > config.stop_logit:
            return sums, step + 1, True
        if others is not None:
            images, present = others(step)
            rows.append(pooled(model(images), present))
        logits = torch.cat(rows)
        loss = -(logits if config.margin is None else logits.clamp(max=config.margin)).sum()
        for group in sgd.param_groups:
            group["lr"] = config.rate(step) * group["scale"]
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return sums, config.steps, False


def activate(y, shortcut=None, mask=None, limit=math.inf):
    """min(max(y + shortcut, 0), limit) where the mask (N, 1, H, W) is not 0, else 0."""
    total = y.to(accumulator_dtype(y.dtype)) + (0 if shortcut is None else shortcut)
    total = total.clamp(0, limit).to(y.dtype)
    return total if mask is None else torch.where(mask != 0, total, 0)


def activate_backward(grad, y, limit=math.inf):
    """The gradient before `activate`, whose result is y; and its sum over all but the channels, of a bias."""
    before = torch.where((y > 0) & (y < limit), grad, 0)
    return before, before.to(accumulator_dtype(y.dtype)).sum((0, 2, 3))


def update_folded(grad, bias_grad, weight, affine, norm, velocity, affine_velocity, *, rate, momentum, decay):
    """A step of SGD on a convolution and its batch normalisation, by the gradients of the two folded into one.

    Folded are weight * gamma / sigma and beta - mean * gamma / sigma; affine (2, O): gamma, beta; norm (2, O):
    1 / sigma, mean. velocities: None at the first step. Returns weight, affine, velocities, folded weight and bias.
    """
    gamma, (inverse, mean) = affine[0], norm
    grad, bias_grad = grad.float(), bias_grad.float()
    for_gamma = inverse * ((grad * weight).sum((1, 2, 3)) - mean * bias_grad)
    gradients = grad * (gamma * inverse)[:, None, None, None], torch.stack([for_gamma, bias_grad])
    moved, velocities = [], []
    for parameter, gradient, before in zip((weight, affine), gradients, (velocity, affine_velocity), strict=True):
        gradient = gradient + decay * parameter
        velocities.append(gradient if before is None else momentum * before + gradient)
        moved.append(parameter - rate * velocities[-1])
    scale = moved[1][0] * inverse
    return (*moved, *velocities, moved[0] * scale[:, None, None, None], moved[1][1] - mean * scale)


class Lattice:
    """The permutohedral lattice of points, (P, d) float32 features: a Gaussian filter of any dimension.

    Adams, Baek and Davis 2010, with Kraehenbuehl and Koltun's rounding: nearest remainder-0 point with ties to even.
    filled: as pydensecrf fills the last group of four points up, with points at the origin that have no weight.
    """

    def __init__(self, features: Tensor, *, filled: bool = False):
        features = features.float()
        own, d = features.shape
        if filled and own % 4:
            features = torch.cat([features, features.new_zeros(1, d)])
        points = len(features)
        spread = torch.tensor(math.sqrt(2 / 3) * (d + 1), dtype=torch.float32).item()
        elevated = features.new_empty(points, d + 1)
        below = features.new_zeros(points)
        for j in range(d, 0, -1):
            scaled = features[:, j - 1] * features.new_tensor(spread / math.sqrt(j * (j + 1)))
            elevated[:, j] = below - j * scaled
            below = below + scaled
        elevated[:, 0] = below
        down = features.new_tensor(1 / (d + 1))
        steps = (elevated * down).round()
        nearest = steps * (d + 1)
        difference = elevated - nearest
        rank = steps.sum(1, dtype=torch.int64)[:, None].repeat(1, d + 1)
        for i in range(d + 1):
            for j in range(i + 1, d + 1):
                less = difference[:, i] < difference[:, j]
                rank[:, i] += less
                rank[:, j] += ~less
        wrap = (d + 1) * ((rank < 0).long() - (rank > d).long())
        rank, nearest = rank + wrap, nearest + wrap
        t = (elevated - nearest) * down
        weights = features.new_zeros(points, d + 2)
        weights.scatter_add_(1, d - rank, t)
        weights.scatter_add_(1, d + 1 - rank, -t)
        weights[:, 0] += 1 + weights[:, d + 1]
        self.weights = weights[:own, : d + 1]
        corner = torch.arange(d + 1, device=features.device)[:, None]
        moves = torch.where(rank[:, None, :d] <= d - corner, corner, corner - (d + 1))
        keys = (nearest[:, None, :d].long() + moves).flatten(0, 1)
        vertices, found = torch.unique(keys, dim=0, return_inverse=True)
        self.corners, self.count, self.d = found.view(points, d + 1)[:own], len(vertices), d
        self.neighbours = [
            [self._find(vertices, vertices + sign - sign * (d + 1) * self._axis(vertices, axis)) for sign in (-1, 1)]
            for axis in range(d + 1)
        ]

    def _axis(self, vertices: Tensor, axis: int) -> Tensor:
        return (torch.arange(self.d, device=vertices.device) == axis).long()

    def _find(self, vertices: Tensor, wanted: Tensor) -> Tensor:
        """Where each wanted key stands among the vertices; self.count where it does not."""
        _, number = torch.unique(torch.cat([vertices, wanted]), dim=0, return_inverse=True)
        place = torch.full((int(number.max()) + 1,), self.count, device=vertices.device)
        place[number[: self.count]] = torch.arange(self.count, device=vertices.device)
        return place[number[self.count :]]

    def filter(self, values: Tensor, *, transpose: bool = False) -> Tensor:
        """(P, C) -> (P, C): splat, blur along every axis (in reverse for the transpose), slice."""
        nothing = values.new_zeros(1, values.shape[1])  # what absent neighbours hold
        weighted = (self.weights[..., None] * values[:, None]).flatten(0, 1)
        lattice = values.new_zeros(self.count, values.shape[1]).index_add(0, self.corners.flatten(), weighted)
        for before, after in reversed(self.neighbours) if transpose else self.neighbours:
            padded = torch.cat([lattice, nothing])
            lattice = lattice + (padded[before] + padded[after]) / 2
        return (self.weights[..., None] * lattice[self.corners]).sum(1) / (1 + 2.0**-self.d)


NORMALIZATIONS = ("symmetric", "after", "before", "none")


def mean_field(unary, lattices, strengths, *, normalizations="symmetric", iterations=10):
    """unary (L, P) -> Q = softmax(-U + sum over terms of strength * after * K(before * Q)), all labels in parallel."""
    if isinstance(normalizations, str):
        normalizations = [normalizations] * len(lattices)
    energies = -unary.T
    q = energies.softmax(1)
    terms = []
    for lattice, strength, how in zip(lattices, strengths, normalizations, strict=True):
        mass = lattice.filter(q.new_ones(len(q), 1)) + 1e-20
        before = {"symmetric": mass.rsqrt(), "before": 1 / mass}.get(how, 1.0)
        after = {"symmetric": mass.rsqrt(), "after": 1 / mass}.get(how, 1.0)
        terms.append((lattice, strength, before, after))
    for _ in range(iterations):
        q = (energies + sum(s * after * lattice.filter(before * q) for lattice, s, before, after in terms)).softmax(1)
    return q.T


def image_features(image, gaussian, bilateral):
    """The features of an image's terms: x and y, and x, y, r, g and b, divided by their standard deviations."""
    height, width = image.shape[:2]
    y, x = torch.meshgrid(
        torch.arange(height, device=image.device).float(),
        torch.arange(width, device=image.device).float(),
        indexing="ij",
    )
    place, features = torch.stack([x, y], -1), []
    if gaussian is not None:
        features.append(place / gaussian[0])
    if bilateral is not None:
        features.append(torch.cat([place / bilateral[0], image.float() / bilateral[1]], -1))
    return [f.flatten(0, 1) for f in features]


def dense_crf(
    image, unary, *, gaussian=(3.0, 3.0), bilateral=(50.0, 5.0, 10.0), iterations=10, normalization="symmetric"
):
    """Mean field of one image (H, W, 3), unary (L, H, W), with a Potts term for each of gaussian and bilateral."""
    lattices = [Lattice(features, filled=True) for features in image_features(image, gaussian, bilateral)]
    strengths = [term[-1] for term in (gaussian, bilateral) if term is not None]
    q = mean_field(unary.float().flatten(1), lattices, strengths, normalizations=normalization, iterations=iterations)
    return q.reshape(unary.shape)


def unary_of_labels(labels, n_labels, confidence, unsure=None):
    """Energies (L, H, W): -log of the confidence for the label, of the rest shared among the others; 0 where unsure."""
    given = labels.long()[None] == torch.arange(n_labels, device=labels.device)[:, None, None]
    rest = (1 - confidence) / (n_labels - 1) if n_labels > 1 else confidence
    energies = torch.where(given, -math.log(confidence), -math.log(rest))
    return energies if unsure is None else torch.where(labels[None] == unsure, 0.0, energies)


def dense_crf_labels(image, labels, n_labels, *, confidence=0.7, unsure=None, **options):
    """labels (K, H, W) of one image -> the most probable labels under the CRF of each label map."""
    result = torch.empty_like(labels)
    for given, out in zip(labels, result, strict=True):
        out.copy_(dense_crf(image, unary_of_labels(given, n_labels, confidence, unsure), **options).argmax(0))
    return result
