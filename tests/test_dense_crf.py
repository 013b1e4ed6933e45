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
    arguments = ([image], [unary], [3.0, 3.0], [50.0, 5.0, 10.0], 2, 0, False, 0)
    torch.library.opcheck(torch.ops.ribfast.dense_crf.default, arguments)
    with pytest.raises(RuntimeError, match="dense_crf: expected tensors that need no gradient"):
        ops.dense_crf([image], [unary.requires_grad_()])


def refused(error, match, *args, **kwargs):
    with pytest.raises(error, match=match):
        ops.dense_crf(*args, **kwargs)


def test_refuses_bad_input():
    image, unary = picture(6, 7, 2)
    refused(TypeError, "two tensors or two lists, got list and Tensor", [image], unary)
    refused(ValueError, r"images \(N, H, W, 3\) and unary \(N, L, H, W\), got shapes", image, unary)
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
