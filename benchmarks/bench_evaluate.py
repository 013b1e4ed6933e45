"""mIoU at 30 thresholds against the released way written straight: for each threshold every file is read again, the
constant background put before its maps, the argmax taken, and all predictions are kept for the confusion.

200 images of 375x500 with 1 or 2 of 20 classes; the released way reads IRN's files, ours npz or IRN's. Reading is in
the time of both; so is decoding the masks, which the released way does at each threshold too.
"""

import cv2
import numpy as np
import pytest

from benchmarks.conftest import seconds
from benchmarks.photographs import write
from ribfast.pipeline import EvaluateConfig, evaluate_maps
from ribfast.store import Store

IMAGES, SIZE, CLASSES = 200, (375, 500), 20
THRESHOLDS = EvaluateConfig("0.05:0.34:0.01")
ASKED = 20.0


def smooth(rng, size):
    """As smooth as a CAM of stride 16, in [0, 1]."""
    cells = tuple(-(-side // 16) for side in SIZE)
    coarse = np.maximum(rng.normal(0, 1, cells), 0).astype(np.float32)
    large = cv2.resize(cv2.GaussianBlur(coarse, (5, 5), 1.0), size[::-1], interpolation=cv2.INTER_LINEAR)
    return large / (large.max() + 1e-5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(source, stores by format)"""
    root, rng = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0)
    classes = [sorted(rng.permutation(CLASSES)[: 1 + number % 2].tolist()) for number in range(IMAGES)]
    labels = (";".join(map(str, of)) for of in classes)
    photographs, masks = (
        (np.zeros((8, 8, 3), np.uint8) for _ in range(IMAGES)),
        Store(root / "data" / "masks", flat=True),
    )
    stores = {format: Store(root / format, format) for format in ("npz", "irn")}
    for number, of in enumerate(classes):
        maps = np.stack([smooth(rng, SIZE) for _ in of])
        strided = np.stack(
            [cv2.resize(m, (-(-SIZE[1] // 4), -(-SIZE[0] // 4)), interpolation=cv2.INTER_AREA) for m in maps]
        )
        for store in stores.values():
            store.save(str(number), of, strided, maps)
        true = np.concatenate([np.full((1, *SIZE), 0.3, np.float32), maps + 0.3 * smooth(rng, SIZE)]).argmax(0)
        mask = np.array([0, *(key + 1 for key in of)])[true]
        outline = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
        masks.save_mask(str(number), np.where(outline, 255, mask))
    return write(root / "data", photographs, lambda number: next(labels), CLASSES), stores


def released(source, store):
    """mIoU at each threshold."""
    found = []
    for threshold in THRESHOLDS.values():
        predictions, masks = [], []
        for item in source:
            content = np.load(store.path(item.name), allow_pickle=True).item()
            maps = np.pad(content["high_res"], ((1, 0), (0, 0), (0, 0)), constant_values=np.float32(threshold))
            keys = np.pad(content["keys"].numpy() + 1, (1, 0))
            predictions.append(keys[maps.argmax(0)])
            masks.append(source.mask(item))
        confusion = np.zeros((CLASSES + 1, CLASSES + 1), np.int64)
        for labels, mask in zip(predictions, masks, strict=True):
            counted = mask != 255
            pairs = mask[counted].astype(np.int64) * (CLASSES + 1) + labels[counted]
            confusion += np.bincount(pairs, minlength=confusion.size).reshape(confusion.shape)
        right, union = np.diagonal(confusion), confusion.sum(0) + confusion.sum(1) - np.diagonal(confusion)
        found.append(np.nanmean(np.where(union > 0, right / np.maximum(union, 1), np.nan)))
    return found


@pytest.fixture(scope="module")
def baseline(made):
    """(seconds, mIoU) of one run, which takes a minute."""
    found = []
    return seconds(lambda: found.extend(released(made[0], made[1]["irn"]))), found


@pytest.mark.parametrize("workers", [1, 2], ids=["1 thread", "2 threads"])
@pytest.mark.parametrize("format", ["npz", "irn"])
def bench_evaluate(benchmark, made, baseline, format, workers):
    (source, stores), (before, expected), results = made, baseline, []

    def ours(resamples):
        config = EvaluateConfig(THRESHOLDS.thresholds, workers=workers, resamples=resamples)
        results.append(evaluate_maps(source, stores[format], config))

    ours(1000)
    after, with_interval = (min(seconds(lambda n=n: ours(n)) for _ in range(5)) for n in (0, 1000))
    far = float(np.abs(np.subtract(results[0]["mious"], expected)).max())
    assert far == 0 or format == "npz"
    assert far < 0.01
    benchmark.extra_info.update(target=ASKED, ratio=before / after, baseline_min=before, ours_min=after,
                                with_interval=with_interval, threads=workers, largest_difference=far)  # fmt: skip
    benchmark.pedantic(lambda: None, rounds=1)
