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


AROUND = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]


def neighbours_of(planes: Tensor, dilations, around=AROUND) -> Tensor:
    """(N, C, H, W) -> (N, C, K, H, W): what is around each pixel, at each dilation; beyond the border, the border."""
    height, width = planes.shape[-2:]
    dilations = [min(d, max(height, width)) for d in dilations]  # farther is the border all the same
    reach = max(dilations)
    rows = torch.arange(-reach, height + reach, device=planes.device).clamp(0, height - 1)
    columns = torch.arange(-reach, width + reach, device=planes.device).clamp(0, width - 1)
    padded = planes[..., rows, :][..., columns]
    return torch.stack([
        padded[..., reach + d * y : reach + d * y + height, reach + d * x : reach + d * x + width]
        for d in dilations for y, x in around
    ], 2)  # fmt: skip


def affinities(images: Tensor, method: str = "par", dilations=(1, 2, 4, 8, 12, 24), w1=0.3, w2=0.01) -> Tensor:
    """The weight of every neighbour of every pixel of images (N, 3, H, W): (N, K, H, W)."""
    others, centres = neighbours_of(images, dilations), images[:, :, None]
    contrast = (others - centres).abs()
    if method == "pamr":
        spread = torch.cat([others, *[centres] * len(dilations)], 2).std(2, keepdim=True)
        return (-contrast / (1e-8 + 0.1 * spread)).mean(1).softmax(1)
    colour = (-((contrast / (others.std(2, keepdim=True) + 1e-8) / w1) ** 2)).mean(1).softmax(1)
    distances = torch.tensor([d * math.hypot(y, x) for d in dilations for y, x in AROUND])
    place = (-((distances / (distances.std() + 1e-8) / w1) ** 2)).softmax(0).to(images)
    return colour + w2 * place[:, None, None]


def refine(images, maps, *, method="par", dilations=(1, 2, 4, 8, 12, 24), iterations=10, w1=0.3, w2=0.01):
    """Maps (N, C, H, W), each pixel summed over its neighbours in every iteration, by affinity in images (N, 3, H, W).

    PAR: softmax of -mean over channels of (|I_k - I_0| / (std of the neighbours + 1e-8) / w1)^2, plus w2 times the same
    of distances, so that weights add up to 1 + w2. PAMR: softmax of -mean of |I_k - I_0| / (1e-8 + 0.1 std), the std of
    the neighbours and of the centre once for each dilation. Standard deviations are unbiased.
    """
    dtype = accumulator_dtype(maps.dtype)
    weights, maps = affinities(images.to(dtype), method, dilations, w1, w2)[:, None], maps.to(dtype)
    for _ in range(iterations):
        maps = (weights * neighbours_of(maps, dilations)).sum(2)
    return maps


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


def _distinct_rows(rows: Tensor) -> tuple[Tensor, int]:
    """The number of each row of integers among the distinct ones, in their order, and how many there are.

    As torch.unique(dim=0) says, which takes ten times as long to compare rows: here each is made one integer.
    """
    numbers, most = rows.new_zeros(len(rows)), 1
    for column in rows.unbind(1):
        least, span = int(column.min()), int(column.max()) - int(column.min()) + 1
        if most * span >= 2**63:
            (known, numbers), (values, column) = (torch.unique(c, return_inverse=True) for c in (numbers, column))
            least, span, most = 0, len(values), len(known)
        numbers, most = numbers * span + (column - least), most * span
    known, numbers = torch.unique(numbers, return_inverse=True)
    return numbers, len(known)


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
        found, self.count = _distinct_rows(keys)
        vertices = keys.new_empty(self.count, d).index_copy(0, found, keys)
        self.corners, self.d = found.view(points, d + 1)[:own], d
        self.neighbours = [
            [self._find(vertices, vertices + sign - sign * (d + 1) * self._axis(vertices, axis)) for sign in (-1, 1)]
            for axis in range(d + 1)
        ]

    def _axis(self, vertices: Tensor, axis: int) -> Tensor:
        return (torch.arange(self.d, device=vertices.device) == axis).long()

    def _find(self, vertices: Tensor, wanted: Tensor) -> Tensor:
        """Where each wanted key stands among the vertices; self.count where it does not."""
        number, count = _distinct_rows(torch.cat([vertices, wanted]))
        place = torch.full((count,), self.count, device=vertices.device)
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
    """Mean field of one image (H, W, 3), unary (L, H, W), with a Potts term for each of gaussian and bilateral.

    unary (K, L, H, W): K problems, each by itself.
    """
    lattices = [Lattice(features, filled=True) for features in image_features(image, gaussian, bilateral)]
    strengths = [term[-1] for term in (gaussian, bilateral) if term is not None]
    options = dict(normalizations=normalization, iterations=iterations)
    problems = unary.float().reshape(-1, unary.shape[-3], unary.shape[-2] * unary.shape[-1])
    q = [mean_field(energies, lattices, strengths, **options) for energies in problems]
    return torch.stack(q).reshape(unary.shape) if q else unary.float()


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


def pair_offsets(radius: int) -> list[tuple[int, int]]:
    """(y, x) from a pixel to its neighbours closer than radius, those that come after it in the order of rows."""
    square = [(y, x) for y in range(radius) for x in range(1 - radius, radius) if y * y + x * x < radius * radius]
    return [(y, x) for y, x in square if y > 0 or x > 0]


def path(y: int, x: int) -> list[tuple[int, int]]:
    """The pixels between (0, 0) and (y, x), both included: those of their bounding box that are closer than 1 to the
    line, row by row."""
    columns = range(min(x, 0), max(x, 0) + 1)
    return [(v, u) for v in range(y + 1) for u in columns if (y * u - x * v) ** 2 < y * y + x * x]


def path_affinity(boundary, radius: int = 5, beta: float = 1.0):
    """boundary (N, h, w) in [0, 1] -> (N, P, h, w): of each pixel and its p-th neighbour (`pair_offsets`),
    (1 - the largest boundary on the path between them) ** beta; 0 for neighbours outside the map."""
    boundary = boundary.to(accumulator_dtype(boundary.dtype))
    height, width = boundary.shape[1:]
    side = radius - 1
    padded = F.pad(boundary, (side, side, 0, side), value=1.0)
    planes = []
    for pair in pair_offsets(radius):
        cells = [padded[:, y : y + height, side + x : side + x + width] for y, x in path(*pair)]
        planes.append((1 - torch.stack(cells).max(0).values).clamp(min=0))  # of equals, the first has the gradient
    return torch.stack(planes, 1) ** beta


def random_walk(cams, affinity, steps: int = 256):
    """cams (C, h, w), affinity (P, h, w) of `pair_offsets` -> cams T^steps, T: the symmetric affinities of all pixels
    with 1 on the diagonal, each column divided by its sum."""
    height, width = cams.shape[1:]
    radius = next(r for r in range(1, 65) if len(pair_offsets(r)) == len(affinity))
    pixels = torch.arange(height * width, device=cams.device).view(height, width)
    matrix = torch.eye(height * width, dtype=accumulator_dtype(cams.dtype), device=cams.device)
    for (y, x), plane in zip(pair_offsets(radius), affinity, strict=True):
        rows, columns = slice(0, max(0, height - y)), slice(max(0, -x), max(0, width - max(x, 0)))
        here = pixels[rows, columns].flatten()
        there = here + y * width + x
        matrix[here, there] = matrix[there, here] = plane[rows, columns].flatten().to(matrix.dtype)
    matrix = matrix / matrix.sum(0)
    return (cams.to(matrix.dtype).flatten(1) @ torch.linalg.matrix_power(matrix, steps)).view(cams.shape)


def pair_losses(boundary, displacement, labels, radius: int = 10):
    """What IRN's loss is made of: sums over pairs of pixels closer than radius, and how many of each kind there are.

    boundary (N, h, w) in [0, 1]; displacement (N, 2, h, w): y, x; labels (N, h, w) uint8, 0 background, 255 unknown.
    Pairs begin at the pixels whose `pair_offsets` are all inside. Returns (8,): of pairs of background, of one class,
    and of two labels the sum of -log(a + 1e-5), the same, and -log(1 + 1e-5 - a) with a their `path_affinity`; of pairs
    of one class the L1 distance between D(i) - D(j) and j - i, of background between it and 0; the three counts.
    """
    height, width = labels.shape[1:]
    side = radius - 1
    rows, columns = max(0, height - side), max(0, width - 2 * side)
    affinity = path_affinity(boundary, radius)
    sums = [affinity.new_zeros(()) for _ in range(8)]
    displacement = displacement.to(affinity.dtype)
    for number, (y, x) in enumerate(pair_offsets(radius)):
        here = (..., slice(0, rows), slice(side, side + columns))
        there = (..., slice(y, y + rows), slice(side + x, side + x + columns))
        known = (labels[here] != 255) & (labels[there] != 255)
        alike = known & (labels[here] == labels[there])
        background, foreground, other = alike & (labels[here] == 0), alike & (labels[here] != 0), known & ~alike
        a = affinity[:, number][here]
        move = displacement[here] - displacement[there]
        wanted = move.new_tensor([y, x]).view(1, 2, 1, 1)
        far, still = (move - wanted).abs().sum(1), move.abs().sum(1)
        terms = [(-(a + 1e-5).log(), background), (-(a + 1e-5).log(), foreground), (-(1 + 1e-5 - a).log(), other)]
        terms += [(far, foreground), (still, background)]
        terms += [(torch.ones_like(a), kind) for kind in (background, foreground, other)]
        sums = [total + torch.where(kind, value, 0).sum() for total, (value, kind) in zip(sums, terms, strict=True)]
    return torch.stack(sums)


def fitted(losses, under_fitting, k):
    """What becomes of losses under pretended under-fitting; k-th powers are chords below 1e-6."""
    if under_fitting == "clamp":
        return losses.clamp(max=k)
    if under_fitting == "ignore":
        return torch.where(losses > k, 0, losses)
    return torch.where(losses > 1e-6, losses.clamp(min=1e-6) ** k, losses * 1e-6 ** (k - 1))


def segmentation_loss(
    logits, labels, *, under_fitting=None, beta=0.5, k=0.5, balanced=False, reduce=None, world=1, counts=None
):
    """Cross-entropy of labels (N, H, W) uint8 under logits (N, L, h, w), enlarged to (H, W) (bilinear,
    align_corners=False); 255 is ignored.

    The mean over labelled pixels; under_fitting: over all pixels, ignored ones with 0, of fitted losses where the mean
    of the losses as they are is below beta; balanced: the mean of the means over background (0) and over foreground.
    """
    logits, label_count = logits.to(accumulator_dtype(logits.dtype)), logits.shape[1]
    known = labels != 255
    if (wrong := labels[known & (labels >= label_count)]).numel():
        raise ValueError(f"segmentation_loss: expected labels below {label_count} or 255, ignored, got {wrong[0]}; "
                         "renumber the labels")  # fmt: skip
    large = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    losses = F.cross_entropy(large, labels.long(), ignore_index=255, reduction="none")
    groups = [labels == 0, known & (labels != 0)]
    whole = losses.new_tensor(labels.numel())
    totals = torch.stack([losses.detach().double().sum(), whole, *(group.sum() for group in groups)]).double()
    if reduce is not None:
        reduced = reduce(totals)
        totals = totals if reduced is None else reduced
    if under_fitting is not None and totals[0] / totals[1] < beta:
        losses = fitted(losses, under_fitting, k)
    pixels, *sizes = totals[1:] if counts is None else counts
    if balanced:
        present = [(group, size) for group, size in zip(groups, sizes, strict=True) if size > 0]
        parts = [losses[group].sum() / size / len(present) for group, size in present]
    else:
        parts = [losses[known].sum() / (sum(sizes) if under_fitting is None else pixels).clamp(min=1)]
    return world * sum(parts, 0 * losses.sum())


def erase(images, maps, which, *, sharpness=100.0, level=0.5):
    """Images (N, C, H, W) with what maps (P, h, w) attend to taken out, which[p] being the image of map p; and, of each
    map, its attention summed over the pixels.

    The attention A is the map, rectified, enlarged (bilinear, align_corners=False) and stretched from its minimum to
    its maximum; 0 where that is rounding (at most 1e-5 of the maximum). Erased: x (1 - sigmoid(sharpness (A - level))).
    Where several pixels are the minimum or the maximum, gradients are those of one of them.
    """
    large = F.interpolate(maps.to(accumulator_dtype(maps.dtype)).relu()[:, None], images.shape[2:], mode="bilinear")
    flat = large.flatten(1)
    low, high = flat.min(1).values, flat.max(1).values
    rounding = (high - low <= 1e-5 * high)[:, None]
    spread = torch.where(rounding, 1.0, (high - low)[:, None])
    attention = torch.where(rounding, 0.0, (flat - low[:, None]) / spread).view_as(large)
    kept = (-sharpness * (attention - level)).sigmoid()
    return (images[which] * kept).to(images.dtype), attention.sum((1, 2, 3))


def grad_cam(features, logits, classes):
    """Grad-CAM before ReLU of each image's classes (N, C) bool, in the order of classes.nonzero().

    Features (N, K, h, w) weighted by their mean gradient of the class's logit (N, C), which is held constant.
    """
    maps = {}
    for number in range(classes.shape[1]):
        if classes[:, number].any():  # images do not meet in the network: the sum's gradient is each one's own
            (grads,) = torch.autograd.grad(logits[:, number].sum(), features, retain_graph=True)
            maps[number] = (grads.mean((2, 3), keepdim=True) * features).sum(1)
    pairs = classes.nonzero().tolist()
    return torch.stack([maps[number][image] for image, number in pairs])


def adversarial_losses(
    localiser, adversary, images, targets, *, attention="cam", erasing=0.05, regularisation=1e-5, regulariser="mean",
    sharpness=100.0, level=0.5,
):  # fmt: skip
    """EADER's losses of a localiser and an adversary (models.CamClassifier) for normalised images and targets (N, C).

    Of each image and each of its classes the attention is erased. The localiser's loss: of its classification, plus
    `erasing` times the adversary's mean probability of that class, plus `regularisation` times the attention's mean
    size. The adversary's: of its classification of what is left, all of the image's classes.
    """
    features = localiser.tail(localiser.trunk(images))
    maps = localiser.classifier(features)
    logits, (which, present) = maps.mean((2, 3)), targets.nonzero(as_tuple=True)
    chosen = maps[which, present] if attention == "cam" else grad_cam(features, logits, targets.bool())
    return adversarial_losses_of(
        adversary, images, targets, logits, chosen, erasing=erasing, regularisation=regularisation,
        regulariser=regulariser, sharpness=sharpness, level=level,
    )  # fmt: skip


def adversarial_losses_of(
    adversary, images, targets, logits, chosen, *, erasing=0.05, regularisation=1e-5, regulariser="mean",
    sharpness=100.0, level=0.5,
):  # fmt: skip
    """The same of the localiser's logits (N, C) and its attention to each image's classes, in order (M, h, w)."""
    which, present = targets.nonzero(as_tuple=True)
    erased, areas = erase(images, chosen, which, sharpness=sharpness, level=level)
    found = adversary.through(erased).mean((2, 3))
    left = found[torch.arange(len(which)), present].sigmoid().mean()
    size = areas.mean() / (images[0, 0].numel() if regulariser == "mean" else 1)
    classification = F.multilabel_soft_margin_loss(logits, targets)
    return classification + erasing * left + regularisation * size, F.multilabel_soft_margin_loss(found, targets[which])
