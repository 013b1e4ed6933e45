"""The stand-ins and operators against the packages they stand in for, on random cases drawn anew in every run."""

import os

import numpy as np
import pytest
import torch

import ribfast.compat.pydensecrf.densecrf as ours
from ribfast import ops
from ribfast.compat.pydensecrf import utils

pytestmark = pytest.mark.peers
CASES = 20


@pytest.fixture(scope="module")
def seed():
    """RIBFAST_PEERS_SEED repeats a run."""
    seed = int(os.environ.get("RIBFAST_PEERS_SEED") or np.random.SeedSequence().entropy % 2**32)
    print(f"\nRIBFAST_PEERS_SEED={seed}")
    return seed


@pytest.fixture
def peer():
    return pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed")


@pytest.fixture
def peer_utils():
    return pytest.importorskip("pydensecrf.utils", reason="pydensecrf2 is not installed")


def draw_scene(draw):
    """(image, unary) of up to 60 pixels a side and 30 labels"""
    height, width = (int(draw.integers(1, 61)) for _ in range(2))
    labels = int(draw.integers(1, 31))
    coarse = draw.random((draw.integers(1, 6), draw.integers(1, 6), 3)) * 220
    image = coarse[np.arange(height)[:, None] * len(coarse) // height, np.arange(width) * coarse.shape[1] // width]
    image = (image + draw.random((height, width, 3)) * 30).astype(np.uint8)
    return image, (draw.random((labels, height, width)) * 3).astype(np.float32)


def draw_compatibility(draw, labels, size):
    kind = draw.integers(3)
    if kind == 0:
        return float(draw.random() * size)
    shape = (labels,) if kind == 1 else (labels, labels)
    return ((draw.random(shape) - 0.5) * size).astype(np.float32)


def draw_terms(draw, image, labels):
    terms = []
    for _ in range(draw.integers(4)):
        normalization = int(draw.integers(4))
        compat = draw_compatibility(draw, labels, 3.0 if normalization else 0.01)
        rest = (compat, int(draw.integers(3)), normalization)
        sxy = float(draw.uniform(0.7, 30)) if draw.random() < 0.5 else tuple(draw.uniform(0.7, 30, 2))
        srgb = float(draw.uniform(3, 60)) if draw.random() < 0.5 else tuple(draw.uniform(3, 60, 3))
        kind = draw.integers(3)
        if kind == 0:
            terms.append(("addPairwiseGaussian", sxy, *rest))
        elif kind == 1:
            terms.append(("addPairwiseBilateral", sxy, srgb, image, *rest))
        else:
            features = utils.create_pairwise_bilateral(tuple(draw.uniform(0.7, 30, 2)), (9.0, 8.0), image[..., :2], 2)
            terms.append(("addPairwiseEnergy", features, *rest))
    return terms


def built(module, image, unary, terms):
    labels, height, width = unary.shape
    crf = module.DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(unary.reshape(labels, -1))
    for name, *arguments in terms:
        getattr(crf, name)(*arguments)
    return crf


def settled(peer, draw, image, unary, terms, iterations):
    """pydensecrf's probabilities, or None where the last bit of the energies moves even those by 1e-6."""
    expected = np.array(built(peer, image, unary, terms).inference(iterations))
    towards = np.where(draw.random(unary.shape) < 0.5, np.float32(9), np.float32(-9))
    moved = np.array(built(peer, image, np.nextafter(unary, towards), terms).inference(iterations))
    return expected if np.abs(moved - expected).max() <= 1e-6 else None


def drawn(peer, seed, case, draw_all_terms):
    """A case whose numbers are settled by the energies, not by the order of sums: (image, unary, terms, ...)."""
    draw = np.random.default_rng([seed, case])
    for _ in range(50):
        image, unary = draw_scene(draw)
        terms, iterations = draw_all_terms(draw, image, len(unary)), int(draw.integers(13))
        expected = settled(peer, draw, image, unary, terms, iterations)
        if expected is not None:
            return image, unary, terms, iterations, expected
    pytest.fail("50 cases in a row in which pydensecrf amplifies rounding")


@pytest.mark.parametrize("case", range(CASES))
def test_stand_in_equals_pydensecrf(case, seed, peer, monkeypatch):
    image, unary, terms, iterations, expected = drawn(peer, seed, case, draw_terms)
    theirs, mine = built(peer, image, unary, terms), built(ours, image, unary, terms)
    for exact, most in ((True, 1e-5), (False, 5e-4)):
        monkeypatch.setattr(ours, "exact", exact)
        assert np.abs(mine.inference(iterations) - expected).max() <= most
    q, scratch = theirs.startInference(), mine.startInference()
    for _ in range(min(iterations, 3)):
        theirs.stepInference(*q)
        mine.stepInference(*scratch)
    assert np.abs(scratch[0] - np.array(q[0])).max() <= 1e-5
    assert mine.klDivergence(scratch[0]) == pytest.approx(theirs.klDivergence(q[0]), rel=1e-5, abs=1e-5 * unary.size)


def draw_two_terms(draw, image, labels):
    """What ops.dense_crf offers: at most one term of a kind, Potts, one normalisation."""
    normalization = int(draw.integers(4))
    size = 3.0 if normalization else 0.01
    terms = []
    if draw.random() < 0.8:
        terms.append(("addPairwiseGaussian", draw.uniform(0.7, 30), draw.random() * size, 1, normalization))
    if draw.random() < 0.8:
        sxy, srgb = draw.uniform(0.7, 60), draw.uniform(3, 60)
        terms.append(("addPairwiseBilateral", sxy, srgb, image, draw.random() * size, 1, normalization))
    return terms


@pytest.mark.parametrize("case", range(CASES))
def test_dense_crf_equals_pydensecrf(case, seed, peer):
    image, unary, terms, iterations, expected = drawn(peer, seed, CASES + case, draw_two_terms)
    options = dict(gaussian=None, bilateral=None, iterations=iterations)
    for name, *arguments in terms:
        *_, compat, _, normalization = arguments
        options["normalization"] = ours._NAMES[ours.NormalizationType(normalization)]
        if name == "addPairwiseGaussian":
            options["gaussian"] = (arguments[0], compat)
        else:
            options["bilateral"] = (*arguments[:2], compat)
    for exact, most in ((True, 1e-5), (False, 5e-4)):
        (got,) = ops.dense_crf([torch.from_numpy(image)], [torch.from_numpy(unary)], exact=exact, **options)
        difference = np.abs(got.numpy().reshape(expected.shape) - expected).max()
        assert difference <= most


@pytest.mark.parametrize("case", range(CASES))
def test_utils_equal_pydensecrfs_to_the_bit(case, seed, peer_utils):
    draw = np.random.default_rng([seed, 2 * CASES + case])
    image, probabilities = draw_scene(draw)
    labels, *shape = probabilities.shape
    p, deviations = float(draw.uniform(0.05, 0.95)), tuple(draw.uniform(0.1, 9, 2))
    for zero_unsure in (True, False) if labels > 1 else ():  # it divides by zero for one label
        drawn_labels = draw.integers(0, labels + zero_unsure, shape)
        arguments = (drawn_labels, labels, p, zero_unsure)
        assert np.array_equal(utils.unary_from_labels(*arguments), peer_utils.unary_from_labels(*arguments))
    probabilities = (probabilities / 3).astype([np.float32, np.float64, np.float16][draw.integers(3)])
    for options in ({}, dict(scale=p), dict(scale=p, clip=None), dict(clip=0.1)):
        mine, theirs = (m.unary_from_softmax(probabilities, **options) for m in (utils, peer_utils))
        assert np.array_equal(mine, theirs)
    for schan in (p * 9, (p, 2.0, 3.0)):
        mine, theirs = (m.create_pairwise_bilateral(deviations, schan, image, 2) for m in (utils, peer_utils))
        assert np.array_equal(mine, theirs)
    mine, theirs = (m.create_pairwise_gaussian(deviations, tuple(shape)) for m in (utils, peer_utils))
    assert np.array_equal(mine, theirs)
