import numpy as np
import pytest
import torch

from ribfast.metrics import Confusion, PerImage, ThresholdSweep, bootstrap_gain, bootstrap_interval

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
        (zeros, zeros.astype(np.uint8) + 4, r"labels in the mask \(or 255, ignored\) of 0 to 3, got 4"),
        (zeros, zeros - 1, "of 0 to 3, got -1"),
        (zeros, zeros + 256, "of 0 to 3, got 256"),
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
        (maps[:, 1:], [0], mask, r"maps \(1, 4, 5\) as keys, mask \(4, 5\) and a stride of 1 have it, got \(1, 3, 5\)"),
        (maps, [0, 1], mask, r"maps \(2, 4, 5\)"),
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


def images_of(n_classes, count, shape=(24, 31)):
    """(maps float16, keys, mask), some without classes."""
    for number in range(count):
        keys = RNG.permutation(n_classes)[: RNG.integers(0, 4)]
        mask = random_mask(n_classes, shape)
        if number % 3 == 0:
            mask[:] = np.where(mask == 255, 255, 0)
        yield RNG.random((len(keys), *shape)).astype(np.float16), keys, mask


@pytest.mark.parametrize("thresholds", [np.arange(0, 1, 0.05), [0.7, 0.1, 0.1, 0.35]])
def test_confusion_at_every_threshold(thresholds):
    images = list(images_of(6, 7))
    sweep = ThresholdSweep(6, thresholds)
    for image in images:
        sweep.add(*image)
    for index, threshold in enumerate(thresholds):
        expected = Confusion(6)
        for maps, keys, mask in images:
            expected.add(naive_labels(maps.astype(np.float32), keys, threshold), mask)
        found = sweep.confusion(index)
        assert np.array_equal(found.matrix, expected.matrix)
        np.testing.assert_array_equal(found.iou(), sweep.ious()[index])


def test_strided_maps_and_merges_of_counts():
    """Counts of several threads, added in any order, are those of one."""
    whole, parts, order = ThresholdSweep(5, [0.2, 0.5]), ThresholdSweep(5, [0.2, 0.5]), []
    for maps, keys, mask in images_of(5, 9, (8, 9)):
        mask = random_mask(5, (29, 35))
        whole.add(maps, keys, mask, stride=4)
        order.append(parts.count(maps, keys, mask, stride=4))
        assert order[-1].histogram.shape == (6, len(keys), 3) and order[-1].true.sum() == (mask != 255).sum()
    for counts in order[::-1]:
        parts.add_counts(counts)
    assert np.array_equal(whole.ious(), parts.ious()) and whole.mious().shape == (2,)


def test_precision_recall_and_f1():
    confusion = Confusion(3)
    confusion.add(np.array([[0, 1, 1, 1, 2]]), np.array([[0, 1, 0, 1, 1]]))
    np.testing.assert_allclose(confusion.precision(), [1, 2 / 3, 0, np.nan])
    np.testing.assert_allclose(confusion.recall(), [1 / 2, 2 / 3, np.nan, np.nan])
    np.testing.assert_allclose(confusion.f1(), [2 / 3, 2 / 3, 0, np.nan])


def size_of(sweep):
    return sum(value.nbytes for value in vars(sweep).values() if isinstance(value, np.ndarray))


def test_memory_does_not_grow_with_the_images():
    sweep = ThresholdSweep(20, np.arange(0, 0.6, 0.01))
    sizes = []
    for image in images_of(20, 12):
        sweep.add(*image)
        sizes.append(size_of(sweep))
    assert len(set(sizes)) == 1 and sizes[0] < 21 * 20 * 61 * 8 + 5000
    held = {name for name, value in vars(sweep).items() if isinstance(value, (list, dict, set))}
    assert not held


@pytest.mark.parametrize("thresholds", [[0.3], [0.7, 0.1, 0.4]])
def test_numbers_of_each_image(thresholds):
    sweep, images, masks = ThresholdSweep(6, thresholds), PerImage(6, thresholds), PerImage(6)
    drawn = list(images_of(6, 8))
    for image in drawn:
        images.add_counts(sweep.count(*image))
    for index, threshold in enumerate(thresholds):
        found = images.numbers(index)
        assert found.shape == (8, 3, 7) and len(images) == 8
        for row, (maps, keys, mask) in zip(found, drawn, strict=True):
            matrix = Confusion(6).count(naive_labels(maps.astype(np.float32), keys, threshold), mask)
            assert np.array_equal(row, [np.diagonal(matrix), matrix.sum(0), matrix.sum(1)])
            if not index:
                masks.add_matrix(matrix)
    assert np.array_equal(masks.numbers(), images.numbers(0))


def test_bootstrap_equals_brute_force():
    pairs = [(RNG.integers(0, 4, (9, 9)), random_mask(3, (9, 9))) for _ in range(12)]
    images = PerImage(3)
    for labels, mask in pairs:
        images.add_matrix(Confusion(3).count(labels, mask))
    found = bootstrap_interval(images.numbers(), resamples=200, seed=3, confidence=0.9)
    draw, mious = np.random.default_rng(3), []
    for _ in range(200):
        confusion = Confusion(3)
        for index in draw.integers(12, size=12):
            confusion.add(*pairs[index])
        mious.append(confusion.miou())
    np.testing.assert_allclose(found, np.quantile(mious, [0.05, 0.95]), rtol=1e-12)
    assert found == bootstrap_interval(images.numbers(), resamples=200, seed=3, confidence=0.9)
    assert found != bootstrap_interval(images.numbers(), resamples=200, seed=4, confidence=0.9)


def test_bootstrap_covers_and_narrows():
    """A resample of one image is that image; more images give narrower intervals, around their mIoU."""
    one = np.zeros((1, 3, 2), np.int32)
    one[0] = [[6, 2], [7, 3], [8, 4]]
    assert bootstrap_interval(one, resamples=5) == pytest.approx([(6 / 9 + 2 / 5) / 2] * 2)
    widths = []
    for count in (10, 1000):
        true = RNG.integers(50, 100, (count, 2))
        right = (true * RNG.uniform(0.4, 0.9, (count, 2))).astype(int)
        numbers = np.stack([right, right + 5, true], 1)
        low, high = bootstrap_interval(numbers, resamples=300)
        total = numbers.sum(0)
        assert low < (total[0] / (total[1] + total[2] - total[0])).mean() < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 4
    assert np.isnan(bootstrap_interval(np.zeros((3, 3, 2)))).all()
    for numbers, options in ((np.zeros((0, 3, 2)), {}), (np.zeros((3, 2, 2)), {}), (one, {"resamples": 0}),
                             (one, {"confidence": 1.0})):  # fmt: skip
        with pytest.raises(ValueError, match="bootstrap_interval: expected"):
            bootstrap_interval(numbers, **options)


def test_gain_resamples_the_same_images_of_both():
    first, second = PerImage(3), PerImage(3)
    pairs = [(RNG.integers(0, 4, (2, 9, 9)), random_mask(3, (9, 9))) for _ in range(12)]
    for (before, after), mask in pairs:
        first.add_matrix(Confusion(3).count(before, mask))
        second.add_matrix(Confusion(3).count(after, mask))
    found = bootstrap_gain(second.numbers(), first.numbers(), resamples=100, seed=3, confidence=0.9)
    draw, gains = np.random.default_rng(3), []
    for _ in range(100):
        both = Confusion(3), Confusion(3)
        for index in draw.integers(12, size=12):
            labels, mask = pairs[index]
            for confusion, own in zip(both, labels, strict=True):
                confusion.add(own, mask)
        gains.append(both[1].miou() - both[0].miou())
    np.testing.assert_allclose(found, np.quantile(gains, [0.05, 0.95]), rtol=1e-12)


def test_gain_of_what_is_better_on_every_image_is_sure():
    """However much images differ: intervals of either alone overlap."""
    true = np.repeat(RNG.integers(50, 5000, (30, 1)), 2, 1)
    right = (true * RNG.uniform(0.1, 0.8, (30, 1))).astype(int)
    before, after = (np.stack([part, true, true], 1) for part in (right, right + true // 20))
    low, high = bootstrap_gain(after, before)
    assert 0.02 < low < high < 0.2
    assert bootstrap_interval(after)[0] < bootstrap_interval(before)[1]
    assert bootstrap_gain(after, after) == (0, 0)
    with pytest.raises(ValueError, match=r"bootstrap_gain: expected numbers of the same images and labels, got \(29"):
        bootstrap_gain(after[1:], before)
    with pytest.raises(ValueError, match="bootstrap_gain: expected a confidence between 0 and 1, got 1"):
        bootstrap_gain(after, before, confidence=1)
    assert np.isnan(bootstrap_gain(np.zeros((3, 3, 2)), np.zeros((3, 3, 2)))).all()
