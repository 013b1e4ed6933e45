"""The CUDA kernels of the lattice and the CRF, run on the CPU (tests/emulator) in the sequences that csrc/cuda runs."""

import ctypes
import math

import cuda_toolkit
import pytest
import torch
from cuda_toolkit import CUDA_INCLUDE, NO_CUDA_INCLUDE
from test_dense_crf import GOLDEN, golden

from ribfast import reference

pytestmark = pytest.mark.skipif(CUDA_INCLUDE is None, reason=NO_CUDA_INCLUDE)
ORDERS = (0, 1, 7)
NORMALIZATIONS = ("symmetric", "after", "before", "none")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    loaded = cuda_toolkit.emulated("crf", tmp_path_factory.mktemp("emulator"))
    loaded.dense_crf.restype = ctypes.c_bool
    return loaded


def at(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def pointers(tensors):
    return None if tensors is None else (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def numbers(values):
    return None if values is None else (ctypes.c_float * len(values))(*values)


def same_in_orders(run, orders):
    first, *others = [run(order) for order in orders]
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a.nan_to_num(nan=123), b.nan_to_num(nan=123))
    return first


def lattice_and_filter(kernels, features, values, transposed=False, capacity=0, filled=False, orders=ORDERS[:2]):
    """(corners, weights, neighbours, vertices, result) of the emulated kernels"""
    points, d = features.shape
    tiles = -(-points // 16)
    most = capacity or (points + (filled and points % 4 > 0)) * (d + 1)

    def run(order):
        corners = torch.full((tiles, d + 1, 16), -7, dtype=torch.int32)
        weights = torch.full((tiles, d + 1, 16), math.nan)
        neighbours = torch.full((d + 1, most + 1, 2), -7, dtype=torch.int32)
        result = torch.full_like(values, math.nan)
        vertices = kernels.filter(
            order, at(features), ctypes.c_int64(points), d, filled, ctypes.c_int64(capacity), at(values),
            values.shape[1], transposed, at(corners), at(weights), at(neighbours), at(result),
        )  # fmt: skip
        return corners, weights, neighbours[:, : vertices + 1], torch.tensor(vertices), result

    return same_in_orders(run, orders)


def by_point(tiled, points):
    """(tiles, d + 1, 16) -> (P, d + 1)"""
    return tiled.transpose(1, 2).flatten(0, 1)[:points]


def first_touch(corners):
    """The number, from 1, of each vertex in the order in which corners name them."""
    _, found = torch.unique(corners.flatten(), return_inverse=True)
    first = torch.full((int(found.max()) + 1,), len(found)).scatter_reduce(0, found, torch.arange(len(found)), "amin")
    number = torch.empty_like(first)
    number[first.argsort()] = torch.arange(1, len(first) + 1)
    return number, number[found].view(corners.shape)


@pytest.mark.parametrize("points, d, spread", [
    (300, 1, 4), (500, 2, 3), (700, 3, 2), (16, 4, 2), (700, 5, 2), (300, 6, 1), (257, 7, 0.3), (520, 8, 9), (1, 5, 1),
])  # fmt: skip
def test_lattice_and_filter(kernels, points, d, spread):
    features = torch.randn(points, d) * spread
    values = torch.rand(points, 8 if d % 2 else 3)
    expected = reference.Lattice(features)
    corners, weights, neighbours, vertices, result = lattice_and_filter(kernels, features, values)
    assert vertices == expected.count
    torch.testing.assert_close(by_point(weights, points), expected.weights, rtol=0, atol=2e-5)
    number, wanted = first_touch(expected.corners)  # the reference numbers vertices by key
    assert torch.equal(by_point(corners, points).long(), wanted)
    assert not by_point(corners, len(corners) * 16)[points:].any()
    assert not by_point(weights, len(corners) * 16)[points:].any()
    number = torch.cat([number, torch.zeros(1, dtype=torch.int64)])  # absent
    for axis, pair in enumerate(expected.neighbours):
        assert not neighbours[axis, 0].any()
        for side in (0, 1):
            assert torch.equal(neighbours[axis, number[:-1], side].long(), number[pair[side]])
    torch.testing.assert_close(result, expected.filter(values), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("points, d", [(1, 5), (15, 2), (303, 5), (254, 3), (304, 5)])
def test_filled_lattice(kernels, points, d):
    features, values = torch.randn(points, d) + 1, torch.rand(points, 4)
    expected = reference.Lattice(features, filled=True)
    *_, vertices, result = lattice_and_filter(kernels, features, values, filled=True)
    assert vertices == expected.count
    torch.testing.assert_close(result, expected.filter(values), rtol=1e-5, atol=1e-6)


def test_transposed_filter_is_the_transpose(kernels):
    features = torch.randn(70, 3)
    unit = torch.eye(70)
    forward = lattice_and_filter(kernels, features, unit)[-1]
    backward = lattice_and_filter(kernels, features, unit, transposed=True)[-1]
    torch.testing.assert_close(backward, forward.T, rtol=1e-5, atol=1e-6)
    assert not torch.equal(forward, forward.T)


def test_lattice_of_equal_and_of_distant_points(kernels):
    for features in (torch.full((600, 5), 3.7), torch.arange(600.0)[:, None] * torch.full((1, 5), 911.0)):
        values = torch.rand(600, 2)
        expected = reference.Lattice(features)
        *_, vertices, result = lattice_and_filter(kernels, features, values)
        assert vertices == expected.count
        torch.testing.assert_close(result, expected.filter(values), rtol=1e-4, atol=1e-5)


def test_positions_beyond_float32_give_nan(kernels):
    features = torch.randn(40, 2)
    features[3] = 1e9
    features[5, 1] = math.nan
    result = lattice_and_filter(kernels, features, torch.ones(40, 1))[-1]
    assert result[[3, 5]].isnan().all()


def test_overflow_is_flagged(kernels):
    features = torch.randn(400, 3) * 5
    count = reference.Lattice(features).count
    assert lattice_and_filter(kernels, features, torch.ones(400, 4), capacity=count)[3] == count
    assert lattice_and_filter(kernels, features, torch.ones(400, 4), capacity=count - 1)[3] == -1


def picture(height, width, labels, seed=0, noise=30):
    """A smooth picture with noise and random energies"""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 5, generator=draw) * 220
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].permute(1, 2, 0)
    image = (image + torch.rand(height, width, 3, generator=draw) * noise).clamp(0, 255).to(torch.uint8).contiguous()
    return image, torch.rand(labels, height, width, generator=draw) * 3


def emulated(kernels, images, unary, given=None, labels=None, *, gaussian=(3.0, 3.0), bilateral=(50.0, 5.0, 10.0),
             iterations=3, normalization="symmetric", exact=False, capacity=0, gap=0.0, unsure=-1,
             orders=(0,)):  # fmt: skip
    """(results, whether a lattice overflowed)"""
    sizes = [side for image in images for side in image.shape[:2]]
    overflowed = []

    def run(order):
        like = given if unary is None else unary
        fill = 77 if unary is None else math.nan
        results = [torch.full_like(t, fill) for t in like]
        overflowed.append(kernels.dense_crf(
            order, len(images), pointers(images), pointers(unary), pointers(given),
            None if unary is None else pointers(results), None if given is None else pointers(results),
            (ctypes.c_int64 * len(sizes))(*sizes), labels or unary[0].shape[0], numbers(gaussian), numbers(bilateral),
            iterations, NORMALIZATIONS.index(normalization), exact, ctypes.c_int64(capacity), ctypes.c_float(gap),
            unsure,
        ))  # fmt: skip
        return results

    return same_in_orders(run, orders), overflowed[0]


def check(kernels, pictures, most=1e-4, orders=(0,), exact=False, **options):
    options = {"iterations": 3} | options
    results, overflow = emulated(kernels, *zip(*pictures, strict=True), orders=orders, exact=exact, **options)
    assert not overflow
    for got, (image, unary) in zip(results, pictures, strict=True):
        torch.testing.assert_close(got, reference.dense_crf(image, unary, **options), rtol=0, atol=most)


@pytest.mark.parametrize("size", [(1, 1), (1, 37), (33, 1), (16, 16), (17, 31), (21, 50)], ids=str)
@pytest.mark.parametrize("labels", [1, 2, 5])
def test_dense_crf_of_every_size(kernels, size, labels):
    check(kernels, [picture(*size, labels)])


@pytest.mark.parametrize("labels", [3, 8, 9, 16, 21, 24, 28, 32, 33, 34, 300])
def test_dense_crf_of_every_number_of_labels(kernels, labels):
    for exact in (False, True):
        check(kernels, [picture(14, 18, labels)], exact=exact, iterations=2)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("labels", [2, 4, 21])
def test_dense_crf_of_every_normalization(kernels, normalization, labels):
    options = dict(normalization=normalization)
    if normalization == "none":  # sums, not means: strengths of another order
        options |= dict(gaussian=(2.0, 0.02), bilateral=(10.0, 9.0, 0.02))
    check(kernels, [picture(19, 33, labels)], **options)


@pytest.mark.parametrize("labels", [2, 21, 40])
def test_dense_crf_in_any_schedule(kernels, labels):
    check(kernels, [picture(20, 18, labels), picture(17, 9, labels, 1)], orders=ORDERS, iterations=2)


def test_dense_crf_of_noise(kernels):
    """Almost every corner a vertex of its own: more in a tile than shared memory holds."""
    for labels in (2, 21):
        check(kernels, [picture(34, 40, labels, noise=255)], bilateral=(50.0, 2.0, 10.0))


def test_dense_crf_of_constant_images_and_tiny_deviations(kernels):
    image, unary = torch.full((20, 35, 3), 77, dtype=torch.uint8), picture(20, 35, 3)[1]
    for bilateral in ((50.0, 5.0, 10.0), (0.05, 0.02, 4.0), (500.0, 300.0, 4.0)):
        check(kernels, [(image, unary)], bilateral=bilateral)
    check(kernels, [picture(20, 35, 3)], gaussian=(0.4, 3.0), bilateral=None)


def test_dense_crf_without_terms_or_iterations(kernels):
    pictures = [picture(20, 30, 3)]
    for options in (dict(gaussian=None), dict(bilateral=None), dict(gaussian=None, bilateral=None), dict(iterations=0)):
        check(kernels, pictures, **options)


def test_dense_crf_of_a_batch_of_sizes(kernels):
    sizes = [(20, 30), (1, 9), (20, 30), (35, 17)]
    pictures = [picture(*size, 6, seed) for seed, size in enumerate(sizes)]
    check(kernels, pictures)
    together, _ = emulated(kernels, *zip(*pictures, strict=True))
    for got, (image, unary) in zip(together, pictures, strict=True):
        assert torch.equal(got, emulated(kernels, [image], [unary])[0][0])


@pytest.mark.parametrize("labels", [2, 5, 21])
def test_several_problems_of_one_image(kernels, labels):
    """Their fields share its lattices: the same bits as of each problem alone."""
    image, unary = picture(19, 21, 3 * labels)
    problems = list(unary.view(3, labels, 19, 21).contiguous())
    check(kernels, [(image, energies) for energies in problems], orders=ORDERS[:2])
    together, _ = emulated(kernels, [image] * 3, problems)
    for got, energies in zip(together, problems, strict=True):
        assert torch.equal(got, emulated(kernels, [image], [energies])[0][0])


@pytest.mark.parametrize("labels", [2, 5, 21])
def test_dense_crf_of_large_energies(kernels, labels):
    image, unary = picture(10, 12, labels)
    unary[-1, :5] += 1e10
    check(kernels, [(image, unary)], iterations=2)


def test_dense_crf_carries_nan(kernels):
    image, unary = picture(20, 30, 3)
    unary[1, 3, 4] = math.nan
    (result,), _ = emulated(kernels, [image], [unary])
    assert result.isnan().any()


@pytest.mark.parametrize("n_labels, unsure", [(1, -1), (2, -1), (5, 0), (40, 1)])
def test_labels(kernels, n_labels, unsure):
    """Label maps of one image share its lattices, and their energies are never in memory."""
    size = (18, 25)
    image = picture(*size, 1)[0]
    given = list(torch.randint(n_labels, (2, *size), dtype=torch.uint8))
    confidence = 0.7
    other = math.log((1 - confidence) / max(1, n_labels - 1)) if n_labels > 1 else math.log(confidence)
    gap = math.log(confidence) - other
    results, _ = emulated(kernels, [image] * 2, None, given, n_labels, gap=gap, unsure=unsure, iterations=4)
    for got, labels in zip(results, given, strict=True):
        unary = torch.full((n_labels, *size), -other)
        unary.scatter_(0, labels.long()[None], -math.log(confidence))
        unary[:, labels == unsure] = 0
        q = reference.dense_crf(image, unary, iterations=4)
        top = q.topk(min(2, n_labels), 0).values
        clear = torch.ones(size, dtype=torch.bool) if n_labels == 1 else top[0] - top[1] > 2e-4
        assert clear.float().mean() > 0.9
        assert torch.equal(got[clear].long(), q.argmax(0)[clear])


@pytest.mark.parametrize("labels", [1, 2, 7])
@pytest.mark.parametrize("how", range(4))
def test_mean_field_of_points(kernels, labels, how):
    features = [torch.randn(300, 3), torch.randn(300, 6) * 0.5]
    unary, strengths = torch.rand(labels, 300) * 3, [1.5, 0.7] if how != 3 else [0.02, 0.03]

    def run(order):
        result = torch.full_like(unary, math.nan)
        kernels.mean_field(
            order, 2, pointers(features), (ctypes.c_int32 * 2)(3, 6), ctypes.c_int64(300), at(unary), labels,
            numbers(strengths), (ctypes.c_int32 * 2)(how, 0), 3, labels == 2, at(result),
        )  # fmt: skip
        return (result,)

    (result,) = same_in_orders(run, ORDERS[:2])
    q = (-unary.T).softmax(1)
    terms = []
    for each, strength, which in zip(features, strengths, (how, 0), strict=True):
        lattice = reference.Lattice(each)
        mass = lattice.filter(torch.ones(300, 1)) + 1e-20
        before = {0: mass.rsqrt(), 2: 1 / mass}.get(which, 1)
        terms.append((lattice, strength, before, {0: mass.rsqrt(), 1: 1 / mass}.get(which, 1)))
    for _ in range(3):
        q = (sum(w * after * lattice.filter(before * q) for lattice, w, before, after in terms) - unary.T).softmax(1)
    torch.testing.assert_close(result, q.T, rtol=0, atol=1e-4)


def test_overflow_is_never_silent(kernels):
    image, unary = picture(20, 35, 3)
    (result,), overflow = emulated(kernels, [image], [unary], capacity=50)
    assert overflow and result.isnan().all()
    (result,), overflow = emulated(kernels, [image], None, [torch.zeros(20, 35, dtype=torch.uint8)], 3, capacity=50)
    assert overflow and (result == 255).all()
    full = emulated(kernels, [image], [unary])[0][0]
    (result,), overflow = emulated(kernels, [image], [unary], capacity=20 * 35 * 6 - 1)
    assert not overflow and torch.equal(result, full)


@pytest.mark.parametrize("case, exact, most", [(4, True, 1e-5), (5, False, 5e-4)])
def test_equals_pydensecrf(kernels, case, exact, most):
    image, unary, options, expected = golden(GOLDEN, case)
    (result,), _ = emulated(kernels, [image.contiguous()], [unary.contiguous()], exact=exact, **options)
    assert (result - expected).abs().max() <= most
    assert torch.equal(result.argmax(0), expected.argmax(0))
