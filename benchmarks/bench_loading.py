"""Training steps from JPEG files against the same steps on crops that are in memory: what loading costs.

The light network on photographs of 375x500, crops of 321, batches of 8, on two threads. Loading has one thread beside
them. Blocks of steps of both take turns; the medians of all steps are compared.
"""

import dataclasses
import json
import statistics

import cv2
import numpy as np
import pytest
import torch

from benchmarks.photographs import block_masks, picture, write
from ribfast.train import SegmentationConfig, segmentation, train_segmenter

IMAGES, SIZE, CLASSES, STEPS, WARM, BLOCKS = 40, (375, 500), 20, 14, 6, 5
ASKED = 0.9


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(source, the folder of its masks)"""
    folder = tmp_path_factory.mktemp("loading")
    source = write(folder / "data", (picture(n, SIZE) for n in range(IMAGES)), lambda n: n % CLASSES, CLASSES)
    (folder / "masks").mkdir()
    for name, mask in block_masks(source, SIZE).items():
        cv2.imwrite(str(folder / "masks" / f"{name}.png"), mask)
    return source, folder / "masks"


def steps(out, source, masks) -> list[float]:
    """Seconds of each step but the first ones, an epoch, in which crops are first kept."""
    config = dataclasses.replace(
        SegmentationConfig.light(), crop=321, steps=STEPS, save_every=STEPS, workers=1, device="cpu"
    )
    train_segmenter(source, config, out, labels=masks)
    seconds = [json.loads(line)["seconds"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return list(np.diff(seconds))[WARM:-1]  # the last two lines are written together


def bench_loading(benchmark, made, tmp_path, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    load, kept, times = segmentation._Segmentation.load, {}, {"files": [], "memory": []}

    def cached(task, index, rng):
        if index not in kept:
            kept[index] = load(task, index, rng)
        return kept[index]

    for block in range(BLOCKS):
        for kind, function in (("files", load), ("memory", cached)):
            monkeypatch.setattr(segmentation._Segmentation, "load", function)
            times[kind] += steps(tmp_path / f"{kind}{block}", *made)
    torch.set_num_threads(before)
    memory, files = (statistics.median(times[kind]) for kind in ("memory", "files"))
    benchmark.extra_info.update(
        target=ASKED, ratio=memory / files, baseline_median=memory, ours_median=files,
        baseline_min=min(times["memory"]), ours_min=min(times["files"]), steps=len(times["files"]), threads=2,
    )  # fmt: skip
    benchmark.pedantic(lambda: None, rounds=1)
