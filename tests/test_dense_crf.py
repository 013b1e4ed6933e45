import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ribfast import ops, reference

GOLDEN = Path(__file__).parent / "golden" / "crf.npz"
SHARED = Path(__file__).parents[2] / "shared" / "golden" / "crf.npz"  # more cases of the same, too large to ship
CASES = [(GOLDEN, case) for case in (4, 5)] + [
    pytest.param(
        SHARED, case, marks=pytest.mark.skipif(not SHARED.exists(), reason="no golden numbers beside the checkout")
    )
    for case in range(4)
]


def golden(path, case):
    """image, unary, options, pydensecrf's probabilities"""
    data = {name: np.load(path)[f"{case}_{name}"] for name in ("img", "U", "gauss", "bil", "t", "q")}
    image = torch.from_numpy(data["img"])
    unary = torch.from_numpy(data["U"]).view(-1, *image.shape[:2])
    terms = {
        name: tuple(data[key]) if data[key][0] else None for name, key in (("gaussian", "gauss"), ("bilateral", "bil"))
    }
    return image, unary, terms | {"iterations": int(data["t"])}, torch.from_numpy(data["q"])


def picture(height, width, labels, seed=0):
    """A smooth noisy picture and random energies"""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 5, generator=draw) * 220
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].permute(1, 2, 0)
    image = (image + torch.rand(height, width, 3, generator=draw) * 30).to(torch.uint8)
    return image, torch.rand(labels, height, width, generator=draw) * 3


@pytest.mark.parametrize("path, case", CASES)
@pytest.mark.parametrize("exact, most", [(True, 1e-5), (False, 5e-4)])
def test_equals_pydensecrf(path, case, exact, most):
    image, unary, options, expected = golden(path, case)
    (result,) = ops.dense_crf([image], [unary], exact=exact, **options)
    assert (result - expected).abs().max() <= most
    assert torch.equal(result.argmax(0), expected.argmax(0))


def test_reference_equals_pydensecrf():
    for case in (4, 5):
        image, unary, options, expected = golden(GOLDEN, case)
        assert (reference.dense_crf(image, unary, **options) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("labels", [1, 2, 3, 4, 5, 8, 9, 20, 21, 24, 40, 300])
def test_every_number_of_labels(labels):
    image, unary = picture(21, 30, labels)
    expected = reference.dense_crf(image, unary, iterations=3)
    for exact in (False, True):
        (result,) = ops.dense_crf([image], [unary], iterations=3, exact=exact)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4 if not exact else 1e-5)
        torch.testing.assert_close(result.sum(0), torch.ones(21, 30))


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 17), (33, 1), (15, 16), (16, 17), (31, 43)], ids=str)
@pytest.mark.parametrize("labels", [2, 3])
def test_every_size(size, labels):
    image, unary = picture(*size, labels)
    (result,) = ops.dense_crf([image], [unary], iterations=4)
    torch.testing.assert_close(result, reference.dense_crf(image, unary, iterations=4), rtol=0, atol=1e-4)


@pytest.mark.parametrize("normalization", ["symmetric", "after", "before", "none"])
@pytest.mark.parametrize("labels", [2, 4, 5])
def test_every_normalization(normalization, labels):
    image, unary = picture(25, 38, labels)
    options = dict(iterations=3, normalization=normalization)
    if normalization == "none":  # sums, not means: strengths of another order
        options |= dict(gaussian=(2.0, 0.02), bilateral=(10.0, 9.0, 0.02))
    (result,) = ops.dense_crf([image], [unary], **options)
    torch.testing.assert_close(result, reference.dense_crf(image, unary, **options), rtol=0, atol=1e-4)


def test_constant_image_and_tiny_deviations():
    image, unary = torch.full((20, 30, 3), 77, dtype=torch.uint8), picture(20, 30, 3)[1]
    for bilateral in ((50.0, 5.0, 10.0), (0.05, 0.02, 4.0), (500.0, 300.0, 4.0)):
        (result,) = ops.dense_crf([image], [unary], bilateral=bilateral)
        expected = reference.dense_crf(image, unary, bilateral=bilateral)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_no_terms_and_no_iterations_are_the_softmax():
    image, unary = picture(20, 30, 3)
    for options in (dict(gaussian=None, bilateral=None), dict(iterations=0)):
        (result,) = ops.dense_crf([image], [unary], **options)
        torch.testing.assert_close(result, (-unary).softmax(0))


def test_batches_equal_single_images():
    pictures = [picture(20, 30, 3, seed) for seed in range(5)]
    images, unary = torch.stack([i for i, _ in pictures]), torch.stack([u for _, u in pictures])
    result = ops.dense_crf(images, unary)
    assert result.shape == unary.shape
    for got, (image, energies) in zip(result, pictures, strict=True):
        torch.testing.assert_close(got, ops.dense_crf([image], [energies])[0], rtol=0, atol=1e-4)
    mixed = [picture(11, 12, 2), picture(40, 8, 21), picture(1, 9, 5)]
    for got, (image, energies) in zip(ops.dense_crf(*zip(*mixed, strict=True)), mixed, strict=True):
        torch.testing.assert_close(got, ops.dense_crf([image], [energies])[0], rtol=0, atol=1e-4)
    assert ops.dense_crf([], []) == []


def problems(height, width, count, labels, seed=0):
    """A picture, and energies of several problems on it"""
    image, unary = picture(height, width, count * labels, seed)
    return image, unary.view(count, labels, height, width)


@pytest.mark.parametrize("labels", [1, 2, 3, 4, 5, 6, 9, 21])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_several_problems_of_one_image(labels, count):
    image, unary = problems(18, 25, count, labels)
    expected = reference.dense_crf(image, unary, iterations=3)
    for exact in (False, True):
        options = dict(iterations=3, exact=exact)
        (result,) = ops.dense_crf([image], [unary], **options)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4 if not exact else 1e-5)
        alone = torch.stack([ops.dense_crf([image], [energies], **options)[0] for energies in unary])
        torch.testing.assert_close(result, alone, rtol=0, atol=1e-5)
        if exact:
            assert torch.equal(result, alone)


def test_many_problems_and_tiles():
    """More channels than a vector holds, more points than a chunk of tiles."""
    image, unary = problems(61, 67, 23, 2)
    (result,) = ops.dense_crf([image], [unary], iterations=4)
    for got, energies in zip(result, unary, strict=True):
        torch.testing.assert_close(got, ops.dense_crf([image], [energies], iterations=4)[0], rtol=0, atol=1e-4)


def test_shapes_of_several_problems():
    image, unary = problems(6, 7, 3, 2)
    assert ops.dense_crf(image[None], unary[None]).shape == (1, 3, 2, 6, 7)
    several, one = ops.dense_crf([image, image[:5]], [unary, unary[0, :, :5]])
    assert several.shape == (3, 2, 6, 7) and one.shape == (2, 5, 7)
    torch.testing.assert_close(several[1], ops.dense_crf([image], [unary[1]])[0], rtol=0, atol=1e-4)
    for options in ({}, dict(exact=True), dict(differentiable=True)):
        assert ops.dense_crf([image], [unary[:0]], **options)[0].shape == (0, 2, 6, 7)
    assert reference.dense_crf(image, unary[:0]).shape == (0, 2, 6, 7)


@pytest.mark.parametrize("labels", [2, 3, 5])
def test_problems_are_independent(labels):
    """Neither NaN nor an infinite energy of one problem reaches another."""
    image, unary = problems(12, 13, 3, labels)
    (expected,) = ops.dense_crf([image], [unary], iterations=2)
    unary[0, 0, 3, 4] = math.nan
    unary[1, 1] = math.inf
    (result,) = ops.dense_crf([image], [unary], nan="propagate", iterations=2)
    assert result[0].isnan().any() and torch.equal(result[2], expected[2])
    assert result[1, 1].max() == 0
    torch.testing.assert_close(result[1], reference.dense_crf(image, unary[1], iterations=2), rtol=0, atol=1e-4)


def test_tiny_probabilities_of_two_labels():
    """Both labels' are shares of one sum, not differences from 1, however many problems there are."""
    image, unary = problems(9, 11, 3, 2)
    unary[:, 1] += 30
    (result,) = ops.dense_crf([image], [unary], iterations=2)
    expected = reference.dense_crf(image, unary, iterations=2)
    assert result.min() > 0
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=0)


def test_threads_change_only_rounding():
    image, unary = picture(120, 150, 4)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([ops.dense_crf([image], [unary])[0] for _ in range(2)])
            assert torch.equal(*results[-1])
    finally:
        torch.set_num_threads(before)
    # sums over points run in another order; mean field amplifies that as it does any rounding of the fast mode
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-4)


def test_any_strides_and_dtypes():
    image, unary = picture(20, 30, 3)
    (expected,) = ops.dense_crf([image], [unary])
    turned = unary.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(ops.dense_crf([image], [turned.double()])[0], expected)
    assert torch.equal(ops.dense_crf([image.transpose(0, 1).contiguous().transpose(0, 1)], [unary])[0], expected)


def test_nan_is_refused_or_carried():
    image, unary = picture(20, 30, 3)
    unary[1, 3, 4] = math.nan
    with pytest.raises(ValueError, match="dense_crf: expected finite energies, got NaN or infinity"):
        ops.dense_crf([image], [unary])
    (result,) = ops.dense_crf([image], [unary], nan="propagate")
    assert result.isnan().any()


def test_opcheck_and_gradient():
    image, unary = picture(12, 13, 3)
    for energies in (unary, torch.stack([unary, 2 * unary])):
        arguments = ([image], [energies], [3.0, 3.0], [50.0, 5.0, 10.0], 2, 0, False, 0)
        torch.library.opcheck(torch.ops.ribfast.dense_crf.default, arguments)
    with pytest.raises(RuntimeError, match="dense_crf: expected tensors that need no gradient"):
        ops.dense_crf([image], [unary.requires_grad_()])


def refused(error, match, *args, **kwargs):
    with pytest.raises(error, match=match):
        ops.dense_crf(*args, **kwargs)


def test_refuses_bad_input():
    image, unary = picture(6, 7, 2)
    refused(TypeError, "two tensors or two lists, got list and Tensor", [image], unary)
    refused(
        ValueError, r"images \(N, H, W, 3\) and unary \(N, L, H, W\) or \(N, K, L, H, W\), got shapes", image, unary
    )
    refused(ValueError, "a unary for each image, got 2 for 1", [image], [unary, unary])
    refused(TypeError, r"uint8 tensors \(H, W, 3\), got torch.float32", [image.float()], [unary])
    refused(ValueError, r"images \(H, W, 3\) with at least one pixel, got shape \(6, 7, 2\)", [image[..., :2]], [unary])
    refused(ValueError, r"the image's size \(6, 7\), got shape \(2, 6, 6\)", [image], [unary[..., :6]])
    refused(TypeError, "float16 or bfloat16, got torch.int64", [image], [unary.long()])
    refused(ValueError, r"gaussian to be 2 numbers or None, got \(3.0,\)", [image], [unary], gaussian=(3.0,))
    refused(TypeError, "gaussian to be 2 numbers or None, got 3", [image], [unary], gaussian=3)
    refused(ValueError, "standard deviations above 0", [image], [unary], bilateral=(0.0, 5.0, 1.0))
    refused(ValueError, "standard deviations above 0", [image], [unary], gaussian=(-3.0, 5.0))
    refused(ValueError, "bilateral to be a finite number", [image], [unary], bilateral=(50.0, math.nan, 1.0))
    refused(ValueError, "larger standard deviations", [image], [unary], bilateral=(1e-9, 1e-9, 1.0))
    refused(ValueError, "iterations of at least 0, got -1", [image], [unary], iterations=-1)
    refused(TypeError, "iterations to be an integer, got float", [image], [unary], iterations=2.5)
    refused(ValueError, "normalization to be one of symmetric, after", [image], [unary], normalization="both")
    refused(ValueError, "nan to be 'error' or 'propagate'", [image], [unary], nan="ignore")
    refused(ValueError, "finite numbers", [image], [unary], gaussian=(3.0, 1e39))
    refused(ValueError, "exact or differentiable, got both", [image], [unary], exact=True, differentiable=True)
    refused(TypeError, "images to be a tensor or a list of tensors, got NoneType", None, None)


@pytest.mark.parametrize("labels", [5, 9, 21])
@pytest.mark.parametrize("size", [1e5, 1e10, 1e30])
def test_large_energies_of_the_last_label(labels, size):
    image, unary = picture(12, 13, labels)
    unary[-1, :6] += size
    (result,) = ops.dense_crf([image], [unary], iterations=3)
    torch.testing.assert_close(result, reference.dense_crf(image, unary, iterations=3), rtol=0, atol=1e-4)


@pytest.mark.parametrize("labels", [2, 3, 4, 5, 21])
@pytest.mark.parametrize("which", [0, -1])
def test_infinite_energy_forbids_a_label(labels, which):
    image, unary = picture(12, 13, labels)
    unary[which] = math.inf
    (result,) = ops.dense_crf([image], [unary], nan="propagate", iterations=2)
    assert result[which].max() == 0 and result.isfinite().all()
    torch.testing.assert_close(result, reference.dense_crf(image, unary, iterations=2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(3, 3), (7, 9), (5, 18)], ids=str)
def test_fills_fours_of_pixels_as_pydensecrf(size):
    """Where the number of pixels is no multiple of 4, the vertices around the origin pass on what they are given."""
    image, unary = picture(*size, 3)
    options = dict(bilateral=(40.0, 60.0, 8.0), iterations=1)
    (result,) = ops.dense_crf([image], [unary], **options)
    torch.testing.assert_close(result, reference.dense_crf(image, unary, **options), rtol=0, atol=1e-5)


def labelled(height, width, n_labels, maps=None, seed=0):
    image, _ = picture(height, width, 1, seed)
    draw = torch.Generator().manual_seed(seed)
    shape = (height, width) if maps is None else (maps, height, width)
    return image, torch.randint(n_labels, shape, generator=draw, dtype=torch.uint8)


@pytest.mark.parametrize("n_labels", [1, 2, 3, 4, 5, 9, 21, 60, 256])
def test_label_maps(n_labels):
    image, labels = labelled(18, 25, n_labels, 3)
    expected = reference.dense_crf_labels(image, labels, n_labels, iterations=3)
    for maps, exact in itertools.product((1, 2, 3), (False, True)):
        (result,) = ops.dense_crf_labels([image], [labels[:maps]], n_labels, iterations=3, exact=exact)
        assert result.dtype == torch.uint8 and torch.equal(result, expected[:maps]), (maps, exact)


def test_label_maps_equal_their_energies():
    """One call for two maps of an image, and calls of dense_crf with the energies in memory."""
    image, labels = labelled(40, 51, 3, 2)
    together = ops.dense_crf_labels(image[None], labels[None], 3, confidence=0.6)[0]
    for given, got in zip(labels, together, strict=True):
        energies = reference.unary_of_labels(given, 3, 0.6)
        expected = ops.dense_crf(image[None], energies[None])[0].argmax(0)
        assert (got != expected).sum() <= 1  # the one label left out rounds differently
        assert torch.equal(ops.dense_crf_labels(image[None], given[None], 3, confidence=0.6)[0], got)


@pytest.mark.parametrize("n_labels", [2, 3, 4, 5, 21, 256])
@pytest.mark.parametrize("unsure", [0, 1, 255])
def test_unsure_labels(n_labels, unsure):
    image, labels = labelled(18, 25, n_labels)
    labels[3:9] = unsure
    (result,) = ops.dense_crf_labels([image], [labels], n_labels, unsure=unsure, iterations=3)
    energies = reference.unary_of_labels(labels, n_labels, 0.7, unsure)
    probabilities = reference.dense_crf(image, energies, iterations=3)
    chosen = probabilities.gather(0, result[None].long())[0]  # of many labels alike, rounding decides between some
    torch.testing.assert_close(chosen, probabilities.amax(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("confidence", [1e-50, 1e-9, 0.99999999])
@pytest.mark.parametrize("n_labels", [2, 3, 5, 9])
def test_extreme_confidence(n_labels, confidence):
    image, labels = labelled(18, 25, n_labels)
    options = dict(confidence=confidence, iterations=2)
    (result,) = ops.dense_crf_labels([image], [labels], n_labels, **options)
    assert torch.equal(result, reference.dense_crf_labels(image, labels[None], n_labels, **options)[0])


def test_label_shapes():
    image, labels = labelled(6, 7, 3, 2)
    assert ops.dense_crf_labels(image[None], labels[None, 0], 3).shape == (1, 6, 7)
    assert ops.dense_crf_labels(image[None], labels[None], 3).shape == (1, 2, 6, 7)
    first, second = ops.dense_crf_labels([image, image[:5]], [labels, labels[0, :5]], 3)
    assert first.shape == (2, 6, 7) and second.shape == (5, 7)
    assert ops.dense_crf_labels([image], [labels[:0]], 3)[0].shape == (0, 6, 7)
    assert ops.dense_crf_labels([], [], 3) == []


def test_refuses_bad_labels():
    image, labels = labelled(6, 7, 3)

    def refused(error, match, image=image, labels=labels, n_labels=3, **options):
        with pytest.raises(error, match="dense_crf_labels: expected " + match):
            ops.dense_crf_labels([image], [labels], n_labels, **options)

    refused(TypeError, "labels to be uint8 tensors", labels=labels.long())
    refused(ValueError, r"labels \(H, W\) or \(K, H, W\) of the image's size \(6, 7\)", labels=labels[:5])
    refused(ValueError, r"labels below n_labels \(2\) or `unsure` \(255\), got 2", n_labels=2, unsure=255)
    refused(ValueError, "n_labels from 1 to 256, got 257", n_labels=257)
    refused(TypeError, "n_labels to be an integer", n_labels=3.0)
    refused(ValueError, "a confidence above 0 and below 1, got 1", confidence=1)
    refused(ValueError, "unsure from 0 to 255, got 256", unsure=256)
    refused(ValueError, "capacity of at least 1, got 0", capacity=0)


def test_mean_field_over_lattices():
    image, unary = picture(20, 31, 5)
    features = reference.image_features(image, (3.0, 3.0), (50.0, 5.0, 10.0))
    lattices = [ops.Lattice(f, filled=True) for f in features]
    result = ops.mean_field(unary.flatten(1), lattices, [3.0, 10.0], exact=True)
    (expected,) = ops.dense_crf([image], [unary], exact=True)
    assert torch.equal(result.view_as(expected), expected)
    names = ["after", "none"]
    strengths = [2.0, 0.03]
    result = ops.mean_field(unary.flatten(1), lattices, strengths, normalizations=names, iterations=4)
    plain = [reference.Lattice(f, filled=True) for f in features]
    expected = reference.mean_field(unary.flatten(1), plain, strengths, normalizations=names, iterations=4)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_differentiable():
    image, unary = picture(12, 15, 4)
    weights = torch.rand(4, 12, 15)
    leaf = unary.clone().requires_grad_()
    (result,) = ops.dense_crf([image], [leaf], iterations=3, differentiable=True)
    torch.testing.assert_close(result.detach(), ops.dense_crf([image], [unary], iterations=3)[0], rtol=0, atol=1e-4)
    (result * weights).sum().backward()
    plain = unary.clone().requires_grad_()
    (reference.dense_crf(image, plain, iterations=3) * weights).sum().backward()
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-4, atol=1e-5)
    several = torch.stack([unary, unary.flip(0)]).requires_grad_()
    (results,) = ops.dense_crf([image], [several], iterations=3, differentiable=True)
    assert torch.equal(results[0], result)
    (results[0] * weights).sum().backward()
    assert torch.equal(several.grad[0], leaf.grad) and not several.grad[1].any()


def test_descends_along_the_gradient():
    """What a CRF layer is for: energies learn to bring about a wanted labelling."""
    image, unary = picture(12, 15, 3)
    wanted = (torch.arange(12)[:, None] // 4).expand(12, 15)
    energies = unary.clone().requires_grad_()
    losses = []
    for _ in range(5):
        (q,) = ops.dense_crf(
            [image], [energies], gaussian=(1.0, 1.0), bilateral=None, iterations=3, differentiable=True
        )
        loss = -q.gather(0, wanted[None]).clamp(min=1e-6).log().mean()
        (gradient,) = torch.autograd.grad(loss, energies)
        energies = (energies - 20 * gradient).detach().requires_grad_()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
