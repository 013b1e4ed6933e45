"""pydensecrf.utils: unary energies from labels or probabilities, features of pairwise terms.

The same bits as pydensecrf's where that has a result. Where it fails by accident there is one here: labels of any
integer type, 255 ("void"), a single label.
"""

import warnings
from numbers import Number

import numpy as np

VOID = 255  # what data sets write where they do not say


def unary_from_labels(labels, n_labels, gt_prob, zero_unsure=True):
    """Energies (n_labels, pixels) of labels that are right with probability gt_prob, in (0, 1).

    zero_unsure: label 0 means "any", and label k is row k - 1; otherwise label k is row k. Label 255 means "any" too,
    unless n_labels is so large that it is a label. A single label gets its own energy, whatever gt_prob says of others.
    """
    labels = np.asarray(labels).ravel()
    if labels.dtype.kind not in "iub":
        raise TypeError(f"unary_from_labels: expected integer labels, got {labels.dtype}; astype(int) them")
    if n_labels < 1:
        raise ValueError(f"unary_from_labels: expected n_labels of at least 1, got {n_labels}")
    if not 0 < gt_prob < 1:
        raise ValueError(f"unary_from_labels: expected gt_prob between 0 and 1, both excluded, got {gt_prob}")
    rows = labels.astype(np.int64) - bool(zero_unsure)
    outside = (rows < 0) | (rows >= n_labels)
    wrong = labels[outside & (labels != VOID) & ~(bool(zero_unsure) & (labels == 0))]
    if wrong.size:
        first, last = (0, n_labels) if zero_unsure else (0, n_labels - 1)
        raise ValueError(f"unary_from_labels: expected labels from {first} to {last} or {VOID} (zero_unsure="
                         f"{bool(zero_unsure)}), got {wrong[0]}")  # fmt: skip
    other = -np.log((1.0 - gt_prob) / (n_labels - 1)) if n_labels > 1 else 0.0
    energies = np.full((n_labels, labels.size), other, np.float32)
    energies[:, outside] = -np.log(1.0 / n_labels)
    (known,) = np.nonzero(~outside)
    energies[rows[known], known] = -np.log(gt_prob)
    return energies


def compute_unary(labels, M, GT_PROB=0.5):
    """unary_from_labels under its old name."""
    warnings.warn("compute_unary is deprecated; use unary_from_labels", DeprecationWarning, stacklevel=2)
    return unary_from_labels(labels, M, GT_PROB)


def unary_from_softmax(sm, scale=None, clip=1e-5):
    """Energies (n_labels, pixels), float32, of probabilities sm (n_labels, ...).

    scale, in (0, 1]: how far sm is trusted; the rest is uniform. clip: the least probability; with None, a
    probability of 0 is an infinite energy, which forbids the label.
    """
    probabilities = np.asarray(sm)
    if probabilities.ndim == 0 or len(probabilities) == 0:
        raise ValueError(f"unary_from_softmax: expected sm (n_labels, ...), got shape {probabilities.shape}")
    labels = len(probabilities)
    if scale is not None:
        if not 0 < scale <= 1:
            raise ValueError(f"unary_from_softmax: expected scale above 0 and at most 1, got {scale}")
        probabilities = scale * probabilities + (1 - scale) * np.full(probabilities.shape, 1 / labels)
    if clip is not None:
        probabilities = np.clip(probabilities, clip, 1.0)
    with np.errstate(divide="ignore"):
        return (-np.log(probabilities)).reshape(labels, -1).astype(np.float32)


def softmax_to_unary(sm, GT_PROB=1):
    """unary_from_softmax under its old name, without a clip."""
    warnings.warn("softmax_to_unary is deprecated; use unary_from_softmax", DeprecationWarning, stacklevel=2)
    return unary_from_softmax(sm, None if GT_PROB == 1 else GT_PROB, clip=None)


def create_pairwise_gaussian(sdims, shape):
    """Features (dimensions, pixels) of positions in an array of `shape`, over the standard deviations sdims.

    They are in the order of the shape: y before x, unlike those of DenseCRF2D.addPairwiseGaussian.
    """
    if len(sdims) != len(shape):
        raise ValueError(f"create_pairwise_gaussian: expected a standard deviation for each dimension of {shape}, "
                         f"got {len(sdims)}")  # fmt: skip
    return _positions("create_pairwise_gaussian", sdims, shape).reshape(len(shape), -1)


def create_pairwise_bilateral(sdims, schan, img, chdim=-1):
    """Features (dimensions + channels, pixels) of positions and channel values over their standard deviations.

    schan: one for all channels, or one for each. chdim: the dimension of img that holds the channels; -1 (not the
    last dimension!): none does. Dimensions and channels beyond the end of sdims and schan are not divided.
    """
    op = "create_pairwise_bilateral"
    img = np.asarray(img)
    channels = img[None] if chdim == -1 else np.moveaxis(img, chdim, 0)
    deviations = [schan] * len(channels) if isinstance(schan, Number) else list(schan)
    dimensions = channels.ndim - 1
    if len(deviations) > len(channels) or len(sdims) > dimensions:
        raise ValueError(f"{op}: expected at most {dimensions} numbers in sdims and {len(channels)} in schan for img "
                         f"of shape {img.shape} with chdim={chdim}, got {len(sdims)} and {len(deviations)}; "
                         "chdim names the dimension that holds the channels")  # fmt: skip
    values = channels.astype(np.float32)
    _divide(op, values, deviations)
    features = np.concatenate([_positions(op, sdims, channels.shape[1:]), values])
    return features.reshape(len(features), -1)


def _positions(op, sdims, shape):
    positions = np.indices(shape, dtype=np.float32)
    _divide(op, positions, sdims)
    return positions


def _divide(op, features, deviations):
    for feature, deviation in zip(features, deviations, strict=False):
        if not deviation > 0:
            raise ValueError(f"{op}: expected standard deviations above 0, got {deviation}")
        feature /= deviation
