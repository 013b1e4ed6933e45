import numpy as np
import pytest
import torch

from ribfast.metrics import Confusion, ThresholdSweep

RNG = np.random.default_rng(5)


def naive_iou(pairs, n_classes):
    """Of (labels, mask) pairs, class by class."""
    labels = np.concatenate([labels[mask != 255] for labels, mask in pairs])
    mask = np.concatenate([mask[mask != 255] for _, mask in pairs])
    ious = []
    for index in range(n_classes + 1):
        union = ((labels == index) | (mask == index)).sum()
        ious.append(((labels == index) & (mask == index)).sum() / union if union else np.nan)
    return np.array(ious)


def random_mask(n_classes, shape):
    mask = RNG.integers(0, n_classes + 1, shape).astype(np.uint8)
    mask[RNG.random(shape) < 0.1] = 255
    return mask


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_confusion(dtype):
    pairs = [(RNG.integers(0, 5, shape).astype(dtype), random_mask(4, shape)) for shape in ((7, 9), (1, 1), (30, 41))]
    whole, halves = Confusion(6), [Confusion(6), Confusion(6)]
    for number, (labels, mask) in enumerate(pairs):
        whole.add(torch.from_numpy(labels), mask)
        halves[number % 2].add(labels, mask)
    expected = naive_iou(pairs, 6)
    np.testing.assert_allclose(whole.iou(), expected)
    assert np.isnan(whole.iou()[5:]).all() and whole.miou() == pytest.approx(np.nanmean(expected))
    halves[0].merge(halves[1])
    assert np.array_equal(halves[0].matrix, whole.matrix)


def test_confusion_of_nothing_and_of_wrong_labels():
    confusion = Confusion(3)
    assert np.isnan(confusion.miou())
    confusion.add(np.zeros((2, 2), int), np.full((2, 2), 255))
    confusion.add(np.zeros((0, 3), int), np.zeros((0, 3), int))
    assert np.isnan(confusion.miou())
    zeros = np.zeros((2, 2), int)
    for labels, mask, message in (
        (zeros + 4, zeros, "labels of 0 to 3, got 4"),
        (zeros - 1, zeros, "labels of 0 to 3, got -1"),
        (zeros, zeros + 4, r"labels in the mask \(or 255, ignored\) of 0 to 3, got 4"),
        (zeros[:1], zeros, r"shape \(2, 2\), got \(1, 2\)"),
        (zeros + 0.5, zeros, "integer labels, got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            confusion.add(labels, mask)
    assert confusion.matrix.sum() == 0
    with pytest.raises(ValueError, match="expected 3 classes, got 4"):
        confusion.merge(Confusion(4))
    with pytest.raises(ValueError, match="n_classes of 1 to 254, got 0"):
        Confusion(0)


def naive_labels(high_res, keys, threshold):
    stacked = np.concatenate([np.full((1, *high_res.shape[1:]), np.float32(threshold)), high_res])
    return np.concatenate([[0], np.asarray(keys, int) + 1])[stacked.argmax(0)]


@pytest.mark.parametrize("thresholds", [np.arange(0, 1, 0.05), [0.3], [0.7, 0.1, 0.1, 0.35]])
def test_sweep_equals_argmax_at_each_threshold(thresholds):
    images = []
    for keys, shape in (([3], (17, 23)), ([4, 0, 2], (31, 8)), ([], (9, 9)), ([1, 2], (40, 50))):
        high_res = RNG.random((len(keys), *shape), dtype=np.float32)
        ties = RNG.random(high_res.shape) < 0.4  # at thresholds exactly, and with one another
        high_res[ties] = RNG.choice(np.asarray(thresholds, np.float32), ties.sum())
        images.append((high_res, keys, random_mask(5, shape)))
    whole, halves = ThresholdSweep(6, thresholds), [ThresholdSweep(6, thresholds) for _ in range(2)]
    for number, image in enumerate(images):
        whole.add(*image)
        halves[number % 2].add(torch.from_numpy(image[0]), torch.tensor(image[1]), torch.from_numpy(image[2]))
    expected = np.stack(
        [naive_iou([(naive_labels(h, k, t), m) for h, k, m in images], 6) for t in np.asarray(thresholds)]
    )
    np.testing.assert_allclose(whole.ious(), expected, rtol=1e-12)
    np.testing.assert_allclose(whole.mious(), np.nanmean(expected, 1), rtol=1e-12)
    best = int(np.nanmean(expected, 1).argmax())
    assert whole.best() == (thresholds[best], pytest.approx(np.nanmean(expected, 1)[best]))
    halves[0].merge(halves[1])
    assert np.array_equal(halves[0].ious(), whole.ious(), equal_nan=True)


def test_sweep_agrees_with_confusion():
    high_res, mask = RNG.random((2, 20, 30), dtype=np.float32), random_mask(3, (20, 30))
    sweep, confusion = ThresholdSweep(3, [0.4]), Confusion(3)
    sweep.add(high_res, [0, 2], mask)
    confusion.add(naive_labels(high_res, [0, 2], 0.4), mask)
    assert np.array_equal(sweep.ious()[0], confusion.iou()) and sweep.mious()[0] == confusion.miou()


def test_sweep_refuses():
    sweep, mask = ThresholdSweep(3, [0.1, 0.2]), np.zeros((4, 5), np.uint8)
    maps = np.zeros((1, 4, 5), np.float32)
    for high_res, keys, labels, message in (
        (maps[:, 1:], [0], mask, r"high_res \(1, 4, 5\) as keys and mask have it, got \(1, 3, 5\)"),
        (maps, [0, 1], mask, r"high_res \(2, 4, 5\)"),
        (maps, [3], mask, r"in 0..2, got \[3\]"),
        (np.repeat(maps, 2, 0), [1, 1], mask, "each key once"),
        (maps * np.float32("nan"), [1], mask, "without NaN"),
        (maps, [1], mask + 4, "of 0 to 3, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep.add(high_res, keys, labels)
    with pytest.raises(ValueError, match="expected images, got none"):
        sweep.best()
    with pytest.raises(ValueError, match="number of classes and thresholds"):
        sweep.merge(ThresholdSweep(3, [0.1]))
    for thresholds in ([], [float("nan")], 0.3):
        with pytest.raises(ValueError, match="list of finite thresholds"):
            ThresholdSweep(3, thresholds)
