import os
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch
from test_dense_crf import GOLDEN, golden, picture

import ribfast.compat
import ribfast.compat.pydensecrf.densecrf as dcrf
from ribfast import ops, reference
from ribfast.compat.pydensecrf import utils
from ribfast.compat.pydensecrf.utils import (
    compute_unary,
    create_pairwise_bilateral,
    create_pairwise_gaussian,
    softmax_to_unary,
    unary_from_labels,
    unary_from_softmax,
)

NORMALIZATIONS = {
    "symmetric": dcrf.NORMALIZE_SYMMETRIC,
    "after": dcrf.NORMALIZE_AFTER,
    "before": dcrf.NORMALIZE_BEFORE,
    "none": dcrf.NO_NORMALIZATION,
}
H, W, LABELS = 9, 12, 3  # a multiple of four pixels: pydensecrf adds vertices to others


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.setattr(dcrf, "exact", False)
    monkeypatch.setattr(dcrf, "nan", "error")


@pytest.fixture
def scene():
    image, unary = picture(H, W, LABELS)
    return image.numpy(), unary.view(LABELS, -1).numpy()


def specified(unary, terms, iterations):
    """Mean field from its formula, with dense matrices. terms: (features (d, P), costs (L, L), normalization)"""
    unary, q = torch.as_tensor(unary), (-torch.as_tensor(unary)).softmax(0)
    kernels = []
    for features, costs, normalization in terms:
        kernel = reference.Lattice(torch.as_tensor(features).T).filter(torch.eye(unary.shape[1]))
        mass = kernel.sum(1) + 1e-20
        left = {"symmetric": mass.rsqrt(), "after": 1 / mass}.get(normalization, torch.ones_like(mass))
        right = {"symmetric": mass.rsqrt(), "before": 1 / mass}.get(normalization, torch.ones_like(mass))
        kernels.append((left[:, None] * kernel * right, torch.as_tensor(costs, dtype=torch.float32)))
    for _ in range(iterations):
        q = (-unary - sum((costs + costs.T) / 2 @ q @ kernel.T for kernel, costs in kernels)).softmax(0)
    return q.numpy()


def xy(sx, sy):
    return np.stack([np.tile(np.arange(W), H) / sx, np.repeat(np.arange(H), W) / sy]).astype(np.float32)


def costs_of(compat):
    return -compat * np.eye(LABELS) if np.ndim(compat) == 0 else np.diag(compat) if np.ndim(compat) == 1 else compat


def crf(unary, *terms):
    made = dcrf.DenseCRF2D(W, H, LABELS)
    made.setUnaryEnergy(unary)
    for name, *arguments in terms:
        getattr(made, name)(*arguments)
    return made


@pytest.mark.parametrize("exact, most", [(True, 1e-5), (False, 5e-4)])
@pytest.mark.parametrize("case", [4, 5])
def test_equals_pydensecrf(case, exact, most, monkeypatch):
    monkeypatch.setattr(dcrf, "exact", exact)
    image, unary, options, expected = golden(GOLDEN, case)
    labels, height, width = unary.shape
    made = dcrf.DenseCRF2D(width, height, labels)
    made.setUnaryEnergy(unary.reshape(labels, -1).numpy())
    if options["gaussian"]:
        made.addPairwiseGaussian(sxy=options["gaussian"][0], compat=options["gaussian"][1])
    if options["bilateral"]:
        sxy, srgb, compat = options["bilateral"]
        made.addPairwiseBilateral(sxy=sxy, srgb=srgb, rgbim=image.numpy(), compat=compat)
    result = made.inference(options["iterations"])
    assert np.abs(result - expected.reshape(labels, -1).numpy()).max() <= most


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(
    "compat",
    [1.5, np.float32([0.5, -1, 2]), np.float32([[0, 1, 2], [0, 0.3, 0], [1, 0, -1]])],
    ids=["number", "vector", "asymmetric matrix"],
)
def test_every_compatibility_and_normalization(compat, normalization, scene):
    _, unary = scene
    compat = compat * (0.05 if normalization == "none" else 1)
    made = crf(unary, ("addPairwiseGaussian", (2, 3), compat, dcrf.DIAG_KERNEL, NORMALIZATIONS[normalization]))
    expected = specified(unary, [(xy(2, 3), costs_of(compat), normalization)], 4)
    np.testing.assert_allclose(made.inference(4), expected, rtol=0, atol=1e-5)


def test_terms_of_every_kind_together(scene):
    image, unary = scene
    matrix = np.float32([[0, 1, 2], [0, 0, 1], [0, 0, 0]])
    made = crf(
        unary,
        ("addPairwiseGaussian", 2.0, 1.5),
        ("addPairwiseBilateral", (5, 4), (13, 10, 20), image, matrix),
        ("addPairwiseEnergy", create_pairwise_gaussian((3.0, 2.0), (H, W)), np.ones(LABELS, "f")),
    )
    colours = image.reshape(-1, 3).T / np.float32([[13], [10], [20]])
    terms = [
        (xy(2, 2), costs_of(1.5), "symmetric"),
        (np.concatenate([xy(5, 4), colours]), matrix, "symmetric"),
        (xy(2, 3)[::-1].copy(), np.eye(LABELS), "symmetric"),
    ]
    np.testing.assert_allclose(made.inference(5), specified(unary, terms, 5), rtol=0, atol=1e-5)


def test_numbers_made_by_hand():
    """One pixel: the normalised filter is the identity, and the message of a pixel to itself stays in."""
    unary, matrix = np.float32([[0.2], [1.0]]), np.float32([[0.0, 3.0], [1.0, 0.5]])
    q = np.exp(-unary) / np.exp(-unary).sum()
    after = np.exp(-unary - np.float32([[0, 2], [2, 0.5]]) @ q)
    made = dcrf.DenseCRF2D(1, 1, 2)
    made.setUnaryEnergy(unary)
    made.addPairwiseGaussian(3, matrix)
    np.testing.assert_allclose(made.inference(1), after / after.sum(), atol=1e-6)
    energy = (q * np.log(q)).sum() + (unary * q).sum() + (q * (np.float32([[0, 2], [2, 0.5]]) @ q)).sum()
    assert made.klDivergence(q) == pytest.approx(energy, abs=1e-6)


def test_a_number_is_minus_that_on_the_diagonal(scene):
    _, unary = scene
    forms = (2.0, np.int64(2), np.array(2.0), np.full(LABELS, -2.0), [-2, -2, -2], -2.0 * np.eye(LABELS))
    results = [crf(unary, ("addPairwiseGaussian", 2, form)).inference(3) for form in forms]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=0, atol=1e-5)


def test_step_by_step(scene):
    image, unary = scene
    made = crf(unary, ("addPairwiseGaussian", 3, 3), ("addPairwiseBilateral", 5, 13, image, 4))
    q, tmp1, tmp2 = made.startInference()
    np.testing.assert_allclose(q, made.inference(0), atol=1e-6)
    energies = [made.klDivergence(q)]
    for steps in range(1, 6):
        assert made.stepInference(q, tmp1, tmp2) is None
        np.testing.assert_allclose(q, made.inference(steps), rtol=0, atol=1e-4)
        energies.append(made.klDivergence(q))
    assert energies[-1] < energies[0]


def test_points_of_any_kind():
    features, unary = np.random.default_rng(0).random((5, 40), np.float32) * 3, np.zeros((2, 40), "f")
    unary[0, :10] = 3
    made = dcrf.DenseCRF(40, 2)
    made.setUnaryEnergy(unary)
    made.addPairwiseEnergy(features, compat=1.5, kernel=dcrf.FULL_KERNEL, normalization=dcrf.NORMALIZE_AFTER)
    expected = specified(unary, [(features, -1.5 * np.eye(2), "after")], 3)
    np.testing.assert_allclose(made.inference(3), expected, rtol=0, atol=1e-5)


def test_without_unary_or_terms(scene):
    image, unary = scene
    np.testing.assert_allclose(crf(unary).inference(5), torch.from_numpy(-unary).softmax(0), atol=1e-6)
    made = dcrf.DenseCRF2D(W, H, 4)
    made.addPairwiseBilateral(5, 13, image, 4)
    np.testing.assert_allclose(made.inference(2), np.full((4, H * W), 0.25), atol=1e-6)


def test_results_serve_as_arrays(scene):
    _, unary = scene
    q = crf(unary, ("addPairwiseGaussian", 3, 3)).inference(2)
    assert np.array(q).shape == (LABELS, H * W) and np.array(q).dtype == np.float32
    assert np.argmax(q, axis=0).reshape(H, W).shape == (H, W)
    assert memoryview(q).shape == q.shape and q[0, 5] == np.array(q)[0, 5]
    q *= 2  # its own memory


def test_unary_from_features_and_objects():
    draw = np.random.default_rng(0)
    weights, features = draw.random((LABELS, 4), np.float32), draw.random((4, H * W), np.float32)
    expected = crf(weights @ features).inference(0)
    made = dcrf.DenseCRF2D(W, H, LABELS)
    for set_energies in (
        lambda: made.setUnaryEnergy(weights, features),
        lambda: made.setUnary(dcrf.LogisticUnary(weights, features)),
        lambda: made.setUnary(dcrf.ConstUnary(weights @ features)),
    ):
        set_energies()
        assert np.array_equal(made.inference(0), expected)


def test_any_arrays(scene):
    image, unary = scene
    terms = lambda image: [("addPairwiseGaussian", 3, 3), ("addPairwiseBilateral", 5, 13, image, 4)]  # noqa: E731
    expected = crf(unary, *terms(image)).inference(3)
    frozen = unary.copy()
    frozen.flags.writeable = False
    energies = [frozen, unary.astype(float), unary.T.copy().T, unary.astype(">f4"), unary[:, ::-1].copy()[:, ::-1]]
    images = [image.astype(float), image.transpose(1, 0, 2).copy().transpose(1, 0, 2), image[::-1].copy()[::-1]]
    frozen = image.copy()
    frozen.flags.writeable = False
    for other in [*energies, unary.tolist(), torch.from_numpy(unary)]:
        assert np.array_equal(crf(other, *terms(image)).inference(3), expected)
    for other in [frozen, image[..., ::-1].copy()[..., ::-1], *images]:
        assert np.array_equal(crf(unary, *terms(other)).inference(3), expected)


def test_energies_are_copied(scene):
    _, unary = scene
    mine = unary.copy()
    made = crf(mine)
    mine[:] = 0
    assert np.array_equal(made.inference(0), crf(unary).inference(0))


def test_constants_are_pydensecrfs_numbers(scene):
    _, unary = scene
    assert [int(kind) for kind in dcrf.KernelType] == [0, 1, 2]
    assert (dcrf.CONST_KERNEL, dcrf.DIAG_KERNEL, dcrf.FULL_KERNEL) == (0, 1, 2)
    names = (dcrf.NO_NORMALIZATION, dcrf.NORMALIZE_BEFORE, dcrf.NORMALIZE_AFTER, dcrf.NORMALIZE_SYMMETRIC)
    assert names == (0, 1, 2, 3)
    results = [crf(unary, ("addPairwiseGaussian", 3, 3, kernel, 2)).inference(2) for kernel in range(3)]
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


def test_subclasses_have_their_own_constructor(scene):
    class Mine(dcrf.DenseCRF2D):
        def __init__(self, w, h, n, unary):
            self.setUnaryEnergy(unary)

    assert np.array_equal(Mine(W, H, LABELS, scene[1]).inference(0), crf(scene[1]).inference(0))


def test_settings_reach_the_kernels(scene, monkeypatch):
    seen, fused = [], ops.mean_field
    monkeypatch.setattr(ops, "mean_field", lambda *a, **k: seen.append(k["exact"]) or fused(*a, **k))
    made = crf(scene[1], ("addPairwiseGaussian", 3, 3))
    made.inference(1)
    monkeypatch.setattr(dcrf, "exact", True)
    made.inference(1)
    monkeypatch.setattr(dcrf, "exact", False)
    assert seen == [False, True]


def test_other_threads_run_during_inference():
    """With the interpreter lock held, the main thread would not run before the other one is done."""
    image, unary = picture(150, 200, 9)
    made = dcrf.DenseCRF2D(200, 150, 9)
    made.setUnaryEnergy(unary.flatten(1).numpy())
    made.addPairwiseBilateral(sxy=50, srgb=5, rgbim=image.numpy(), compat=10)
    started, finished, ticks = threading.Event(), threading.Event(), 0

    def infer():
        started.set()
        made.inference(400)
        finished.set()

    thread = threading.Thread(target=infer)
    thread.start()
    started.wait()
    while not finished.wait(0.002):
        ticks += 1
    thread.join()
    assert ticks >= 5


def test_environment_asks_for_exact():
    code = "from ribfast.compat.pydensecrf import densecrf; print(densecrf.exact)"
    environment = os.environ | {"RIBFAST_CRF_EXACT": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "True", result.stderr


def test_nan_is_refused_or_carried(scene, monkeypatch):
    _, unary = scene
    broken = unary.copy()
    for value in (np.nan, -np.inf):
        broken[1, 7] = value
        with pytest.raises(ValueError, match=r"setUnaryEnergy: expected finite energies, got NaN or infinity.*nan ="):
            crf(broken)
    broken[:, 7] = np.inf
    with pytest.raises(ValueError, match="expected finite energies"):
        crf(broken)
    monkeypatch.setattr(dcrf, "nan", "propagate")
    assert np.isnan(crf(broken, ("addPairwiseGaussian", 3, 3)).inference(2)).any()
    monkeypatch.setattr(dcrf, "nan", "ignore")
    with pytest.raises(ValueError, match="nan to be 'error' or 'propagate', got 'ignore'"):
        crf(unary)


def test_infinity_forbids_a_label(scene):
    _, unary = scene
    unary = unary.copy()
    unary[1, 7] = np.inf
    made = crf(unary, ("addPairwiseGaussian", 3, 3))
    q = made.inference(3)
    unary[1, 7] = 1e6
    assert q[1, 7] == 0
    np.testing.assert_allclose(q, specified(unary, [(xy(3, 3), costs_of(3), "symmetric")], 3), atol=1e-5)
    assert np.isfinite(made.klDivergence(q))


def test_refuses_bad_input(scene):
    image, unary = scene
    made = crf(unary)

    def refused(error, match, call, *arguments):
        with pytest.raises(error, match=match):
            call(*arguments)

    gaussian, bilateral = made.addPairwiseGaussian, made.addPairwiseBilateral
    refused(ValueError, "width and a height of at least 1, got 0 and 4", dcrf.DenseCRF2D, 0, 4, 2)
    refused(ValueError, "at least one point and one label", dcrf.DenseCRF, 5, 0)
    refused(ValueError, r"\(3, 108\), got shape \(3, 9, 12\); reshape\(\(3, -1\)\)", made.setUnaryEnergy,
            unary.reshape(LABELS, H, W))  # fmt: skip
    refused(ValueError, r"= \(3, 108\), got shape \(2, 108\)", made.setUnaryEnergy, unary[:2])
    refused(TypeError, "setUnaryEnergy: expected u .* of real numbers, got complex64", made.setUnaryEnergy, unary + 0j)
    refused(TypeError, "ConstUnary or LogisticUnary, got ndarray", made.setUnary, unary)
    refused(ValueError, r"DenseCRF2D takes the width first", bilateral, 3, 3, image.transpose(1, 0, 2), 1)
    refused(ValueError, r"create_pairwise_bilateral", bilateral, 3, 3, image[..., :1], 1)
    refused(ValueError, r"rgbim \(h, w, 3\) = \(9, 12, 3\), got shape \(108, 3\)", bilateral, 3, 3,
            image.reshape(-1, 3), 1)  # fmt: skip
    refused(ValueError, "sxy with standard deviations above 0, got 0", gaussian, 0, 1)
    refused(ValueError, "srgb with standard deviations above 0, got nan", bilateral, 3, float("nan"), image, 1)
    refused(ValueError, r"sxy to be a number or 2 numbers, got \(3,\)", gaussian, (3,), 1)
    refused(ValueError, r"compat to be a number, \(3,\) or \(3, 3\), got shape \(2,\)", gaussian, 3, [1, 2])
    refused(ValueError, "a finite compat", gaussian, 3, float("nan"))
    refused(TypeError, "compat .* of real numbers, got object", gaussian, 3, None)
    refused(ValueError, "constants for kernel and normalization, got 1 and 7", gaussian, 3, 1, 1, 7)
    refused(ValueError, r"with 108 pixels, got shape \(108, 2\); transpose it", made.addPairwiseEnergy, xy(1, 1).T, 1)
    refused(ValueError, "finite features", made.addPairwiseEnergy, xy(1, 1) * np.nan, 1)
    refused(TypeError, "the Q that startInference returned, got list", made.stepInference, [1], None, None)
    refused(ValueError, r"klDivergence: expected Q of shape \(3, 108\), got \(2, 108\)", made.klDivergence, unary[:2])
    refused(NotImplementedError, "gradient: only learning", made.gradient, 1)
    refused(NotImplementedError, "setKernelParameters: only learning", made.setKernelParameters, unary)


@pytest.fixture
def modules(monkeypatch):
    """sys.modules without pydensecrf, put back afterwards"""
    for name in [name for name in sys.modules if name.partition(".")[0] == "pydensecrf"]:
        monkeypatch.delitem(sys.modules, name)
    before = dict(sys.modules)
    yield sys.modules
    for name in set(sys.modules) - set(before):
        del sys.modules[name]


def test_install(modules):
    ribfast.compat.install()
    ribfast.compat.install(exact=True, nan="propagate")
    import pydensecrf.densecrf
    import pydensecrf.utils as installed
    from pydensecrf.densecrf import DenseCRF2D

    assert DenseCRF2D is dcrf.DenseCRF2D and pydensecrf.densecrf is dcrf and installed is utils
    assert dcrf.exact is True and dcrf.nan == "propagate"
    ribfast.compat.install()
    assert dcrf.exact is True
    with pytest.raises(ValueError, match="nan to be 'error' or 'propagate'"):
        ribfast.compat.install(nan="no")


@pytest.mark.parametrize("name", ["pydensecrf", "pydensecrf.densecrf"])
def test_install_comes_before_the_real_one(name, modules):
    modules[name] = real = types.ModuleType(name)
    before = {n: m for n, m in modules.items() if n.startswith("pydensecrf")}
    with pytest.raises(RuntimeError, match=f"before the first import of pydensecrf, got {name} of"):
        ribfast.compat.install(exact=True)
    assert modules[name] is real and {n: m for n, m in modules.items() if n.startswith("pydensecrf")} == before
    assert dcrf.exact is False


def test_unary_from_labels():
    labels = np.array([[0, 1], [2, 1]])
    p, q, u = -np.log(0.7), -np.log(0.15), np.log(3)
    expected = [[u, p, q, p], [u, q, p, q], [u, q, q, q]]
    for kind in (np.int64, np.int32, np.uint8, np.uint64):
        got = unary_from_labels(labels.astype(kind), 3, 0.7)
        assert got.dtype == np.float32 and got.flags.c_contiguous
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    expected = [[p, q, q, q], [q, p, q, p], [q, q, p, q]]
    np.testing.assert_allclose(unary_from_labels(labels, 3, 0.7, zero_unsure=False), expected, rtol=1e-6)
    with pytest.warns(DeprecationWarning):
        assert np.array_equal(compute_unary(labels, 3), unary_from_labels(labels, 3, 0.5))


@pytest.mark.parametrize("zero_unsure", [True, False])
def test_void_is_unsure(zero_unsure):
    got = unary_from_labels(np.uint8([1, 255]), 2, 0.7, zero_unsure)
    np.testing.assert_allclose(got[:, 1], np.log([2, 2]), rtol=1e-6)
    large = unary_from_labels(np.uint8([255]), 256, 0.7, zero_unsure)
    assert large[255 - zero_unsure, 0] == large.min() < large.max()


def test_one_label():
    np.testing.assert_allclose(unary_from_labels(np.uint8([1, 0]), 1, 0.7), [[-np.log(0.7), 0]], rtol=1e-6)


def test_labels_are_checked():
    with pytest.raises(ValueError, match=r"labels from 0 to 3 or 255 \(zero_unsure=True\), got 4"):
        unary_from_labels([1, 4], 3, 0.7)
    with pytest.raises(ValueError, match=r"labels from 0 to 2 or 255 \(zero_unsure=False\), got -1"):
        unary_from_labels([1, -1], 3, 0.7, zero_unsure=False)
    with pytest.raises(TypeError, match="integer labels, got float64"):
        unary_from_labels([1.0], 3, 0.7)
    for p in (0, 1, 1.5):
        with pytest.raises(ValueError, match="gt_prob between 0 and 1"):
            unary_from_labels([1], 3, p)
    with pytest.raises(ValueError, match="n_labels of at least 1"):
        unary_from_labels([1], 0, 0.7)


def test_unary_from_softmax():
    probabilities = np.array([[[0.0, 0.25]], [[1.0, 0.75]]])
    near = dict(rtol=1e-6, atol=1e-7)
    got = unary_from_softmax(probabilities)
    assert got.dtype == np.float32 and got.shape == (2, 2)
    np.testing.assert_allclose(got, -np.log([[1e-5, 0.25], [1, 0.75]]), **near)
    scaled = -np.log([[0.2, 0.35], [0.8, 0.65]])
    np.testing.assert_allclose(unary_from_softmax(probabilities, scale=0.6), scaled, **near)
    assert unary_from_softmax(probabilities, clip=None)[0, 0] == np.inf
    with pytest.warns(DeprecationWarning):
        assert softmax_to_unary(probabilities)[0, 0] == np.inf
    with pytest.warns(DeprecationWarning):
        np.testing.assert_allclose(softmax_to_unary(probabilities, 0.6), scaled, **near)
    with pytest.raises(ValueError, match="scale above 0 and at most 1, got 0"):
        unary_from_softmax(probabilities, scale=0)


def test_pairwise_features():
    spatial = [[0, 0, 0, 0.5, 0.5, 0.5], np.array([0, 1, 2, 0, 1, 2]) / 4]  # y before x
    got = create_pairwise_gaussian((2, 4), (2, 3))
    assert got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_allclose(got, spatial)
    image = np.arange(12, dtype=np.uint8).reshape(2, 3, 2)
    expected = [*spatial, image[..., 0].ravel() / 5, image[..., 1].ravel() / 10]
    np.testing.assert_allclose(create_pairwise_bilateral((2, 4), (5, 10), image, chdim=2), expected, rtol=1e-6)
    np.testing.assert_allclose(
        create_pairwise_bilateral((2, 4), (5, 10), image.transpose(2, 0, 1), chdim=0), expected, rtol=1e-6
    )
    grey = create_pairwise_bilateral(sdims=(2, 4), schan=5, img=image[..., 0])
    np.testing.assert_allclose(grey, expected[:3], rtol=1e-6)
    partly = create_pairwise_bilateral((2, 4), (5,), image, chdim=2)
    np.testing.assert_allclose(partly, [*expected[:3], image[..., 1].ravel()], rtol=1e-6)
    with pytest.raises(ValueError, match="chdim names the dimension that holds the channels"):
        create_pairwise_bilateral((2, 4), (5, 10), image)
    with pytest.raises(ValueError, match="a standard deviation for each dimension"):
        create_pairwise_gaussian((2,), (2, 3))
    with pytest.raises(ValueError, match="standard deviations above 0, got 0"):
        create_pairwise_gaussian((2, 0), (2, 3))
