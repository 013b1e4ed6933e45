"""The dense CRF on the CPU against pydensecrf (its maintained build, pydensecrf2), one thread against one thread."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ribfast import ops

# (gaussian, bilateral, labels) -> times faster than pydensecrf that is asked for, per core
SETS = {
    ((3.0, 3.0), (50.0, 5.0, 10.0), 2): 5.0,
    ((3.0, 3.0), (50.0, 5.0, 10.0), 4): 5.0,
    ((3.0, 3.0), (50.0, 5.0, 10.0), 21): 4.0,
    ((3.0, 3.0), (80.0, 13.0, 10.0), 4): 5.0,
    ((1.0, 3.0), (67.0, 3.0, 4.0), 21): 3.5,
    ((1.0, 3.0), (67.0, 3.0, 4.0), 81): 4.0,
}
PHOTO = Path(__file__).parents[1] / "ribfast" / "assets" / "coffee.jpg"


def photograph():
    return cv2.cvtColor(cv2.imread(str(PHOTO)), cv2.COLOR_BGR2RGB)


def coarse_labels(labels, shape, seed=0):
    coarse = np.random.default_rng(seed).integers(0, labels, (6, 8)).astype(np.uint8)
    return cv2.resize(coarse, shape[1::-1], interpolation=cv2.INTER_NEAREST)


def inputs(labels):
    """A 375x500 photograph and energies of coarse random labels held with a confidence of 0.7."""
    image = photograph()
    at = coarse_labels(labels, image.shape)
    unary = np.full((labels, *at.shape), -np.log(0.3 / (labels - 1)), np.float32)
    np.put_along_axis(unary, at[None].astype(np.int64), np.float32(-np.log(0.7)), 0)
    return image, unary


def peer(image, unary, gaussian, bilateral):
    densecrf = pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed")
    labels, height, width = unary.shape
    crf = densecrf.DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(unary.reshape(labels, -1))
    crf.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1])
    crf.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], rgbim=image, compat=bilateral[2])
    return np.array(crf.inference(10)).reshape(labels, height, width)


@pytest.mark.parametrize("gaussian, bilateral, labels", SETS, ids=lambda value: str(value))
def bench_dense_crf(compare, gaussian, bilateral, labels):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        image, unary = inputs(labels)
        pixels, energies = torch.from_numpy(image), torch.from_numpy(unary)

        def ours():
            return ops.dense_crf([pixels], [energies], gaussian=gaussian, bilateral=bilateral)[0]

        expected = peer(image, unary, gaussian, bilateral)
        difference = float(np.abs(ours().numpy() - expected).max())
        compare(
            ours,
            lambda: peer(image, unary, gaussian, bilateral),
            target=SETS[gaussian, bilateral, labels],
            rounds=4 if labels == 81 else 10,
            of_minima=True,
            against="pydensecrf2",
            largest_difference=difference,
        )
    finally:
        torch.set_num_threads(before)


def bench_two_label_crfs_of_one_image(compare):
    """IRN's: confident foreground and confident background, 3 labels each, from label maps to label maps."""
    utils = pytest.importorskip("pydensecrf.utils", reason="pydensecrf2 is not installed")
    image = photograph()
    maps = np.stack([coarse_labels(3, image.shape, seed) for seed in (0, 1)])
    pixels, given = torch.from_numpy(image), torch.from_numpy(maps)
    gaussian, bilateral = (3.0, 3.0), (50.0, 5.0, 10.0)

    def ours():
        return ops.dense_crf_labels([pixels], [given], 3, gaussian=gaussian, bilateral=bilateral)[0]

    def theirs():
        results = []
        for labels in maps:
            unary = utils.unary_from_labels(labels, 3, gt_prob=0.7, zero_unsure=False)
            probabilities = peer(image, unary.reshape(3, *labels.shape), gaussian, bilateral)
            results.append(probabilities.argmax(0))
        return results

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        flips = int((ours().numpy() != np.stack(theirs())).sum())
        compare(
            ours, theirs, target=8.0, rounds=8, of_minima=True, against="pydensecrf2, twice", labels_that_differ=flips
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("against", ["three calls", "pydensecrf2, three times"])
def bench_problems_of_one_image(compare, against):
    """PMM's: three classes, two labels each, in one call."""
    image = photograph()
    shares = np.stack([coarse_labels(2, image.shape, seed) for seed in range(3)]) * np.float32(0.4) + np.float32(0.3)
    unary = -np.log(np.stack([1 - shares, shares], 1))
    pixels, energies = torch.from_numpy(image), torch.from_numpy(unary)
    gaussian, bilateral = (3.0, 10.0), (80.0, 13.0, 10.0)

    def ours(problems=energies):
        return ops.dense_crf([pixels], [problems], gaussian=gaussian, bilateral=bilateral)[0]

    def apart():
        if against == "three calls":
            return np.stack([ours(problem).numpy() for problem in energies])
        return np.stack([peer(image, problem, gaussian, bilateral) for problem in unary])

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        difference = float(np.abs(ours().numpy() - apart()).max())
        target = 1.5 if against == "three calls" else 8.0
        compare(ours, apart, target=target, rounds=8, of_minima=True, against=against, largest_difference=difference)
    finally:
        torch.set_num_threads(before)


MEASURED = """
import re, sys
from pathlib import Path
import cv2, numpy as np, torch
sys.path[:0] = [{benchmarks!r}]
from bench_crf import inputs, peer, coarse_labels, photograph
from ribfast import ops
torch.set_num_threads(1)
if {side} == 375:
    image, unary = inputs({labels})
else:
    image = cv2.resize(photograph(), ({side}, {side}), interpolation=cv2.INTER_CUBIC)
    unary = np.full(({labels}, {side}, {side}), 1.0, np.float32)
    np.put_along_axis(unary, coarse_labels({labels}, image.shape)[None].astype(np.int64), np.float32(0), 0)
def highest():  # getrusage's would be inherited from the parent
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = highest()
if {ours}:
    ops.dense_crf([torch.from_numpy(image)], [torch.from_numpy(unary)], iterations=1)
else:
    peer(image, unary, (3.0, 3.0), (50.0, 5.0, 10.0))
print((highest() - before) / 2**10)
"""


def peak(side, labels, ours):
    """MiB that a call adds to its process's peak, its result included."""
    code = MEASURED.format(benchmarks=str(Path(__file__).parent), side=side, labels=labels, ours=ours)
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("labels", [2, 21, 81])
def bench_peak_memory(benchmark, labels):
    """pydensecrf's peak memory over ours, on the photograph."""
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed")
    ours, theirs = peak(375, labels, True), peak(375, labels, False)
    benchmark.extra_info.update(
        target=1.0, ratio=theirs / ours, against="pydensecrf2", ours_mib=ours, baseline_mib=theirs, threads=1
    )
    benchmark.pedantic(lambda: None)


def bench_memory_of_16_megapixels(benchmark):
    """4096x4096 with 21 labels: peak memory in units of its unary, which is as large as its result."""
    mib = peak(4096, 21, True)
    unary = 21 * 4096**2 * 4 / 2**20
    benchmark.extra_info.update(target=None, ratio=mib / unary, ours_mib=mib, unary_mib=unary, threads=1)
    benchmark.pedantic(lambda: None)


@pytest.mark.parametrize("images", [1, 4], ids=["one image", "4 images"])
def bench_dense_crf_on_two_threads(compare, images):
    """Two threads against one; the baseline is the same call on one thread."""
    image, unary = inputs(4)
    pixels, energies = [torch.from_numpy(image)] * images, [torch.from_numpy(unary)] * images
    before = torch.get_num_threads()

    def on(threads):
        torch.set_num_threads(threads)
        ops.dense_crf(pixels, energies)

    try:
        compare(
            lambda: on(2),
            lambda: on(1),
            target=1.5 if images == 1 else 1.8,
            rounds=10,
            of_minima=True,
            against="one thread",
        )
    finally:
        torch.set_num_threads(before)
