"""The dense CRF on the CPU against pydensecrf (its maintained build, pydensecrf2), one thread against one thread."""

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


def inputs(labels):
    """A 375x500 photograph and energies of coarse random labels held with a confidence of 0.7."""
    image = cv2.cvtColor(cv2.imread(str(PHOTO)), cv2.COLOR_BGR2RGB)
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, labels, (6, 8)).astype(np.uint8)
    at = cv2.resize(coarse, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
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
            rounds=3 if labels == 81 else 6,
            against="pydensecrf2",
            largest_difference=difference,
        )
    finally:
        torch.set_num_threads(before)


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
        compare(lambda: on(2), lambda: on(1), target=1.5 if images == 1 else 1.8, rounds=6, against="one thread")
    finally:
        torch.set_num_threads(before)
