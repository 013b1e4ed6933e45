import math
import os

import pytest
import torch

from ribfast import ops, reference


def points(count, dims, seed=0):
    """Positions in clusters, so that points share vertices, some of them far away."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, dims, generator=draw) * 4
    near = torch.randn(count, dims, generator=draw) * 0.4
    return centres[torch.randint(5, (count,), generator=draw)] + near, draw


@pytest.mark.parametrize("dims", range(1, 9))
@pytest.mark.parametrize("count", [1, 16, 17, 90])
@pytest.mark.parametrize("transpose", [False, True])
def test_equals_reference(dims, count, transpose):
    features, draw = points(count, dims)
    values = torch.randn(count, 3, generator=draw)
    result = ops.Lattice(features).filter(values, transpose=transpose)
    expected = reference.Lattice(features).filter(values, transpose=transpose)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [0, 1, 2, 3, 4, 5, 8, 12, 15, 16, 17, 24, 28, 36, 100])
def test_every_number_of_channels(channels):
    features, draw = points(75, 5)
    values = torch.randn(75, channels, generator=draw)
    lattice = ops.Lattice(features)
    expected = reference.Lattice(features).filter(values)
    torch.testing.assert_close(lattice.filter(values), expected, rtol=1e-5, atol=1e-5)


def test_one_vector_of_values_and_other_dtypes():
    features, draw = points(40, 3)
    values = torch.randn(40, generator=draw)
    lattice = ops.Lattice(features.double())
    assert lattice.points == 40 and lattice.dims == 3
    column = lattice.filter(values[:, None])[:, 0]
    assert torch.equal(lattice.filter(values), column)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        result = lattice.filter(values.to(dtype))
        assert result.dtype == dtype
        torch.testing.assert_close(result, lattice.filter(values.to(dtype).float()).to(dtype))


@pytest.mark.parametrize("lines", ["long", "short", "alone"])
def test_lines_of_every_length(lines):
    """A row of points makes lines of many vertices, a cloud short ones, and far points stand alone."""
    draw = torch.Generator().manual_seed(1)
    if lines == "long":
        features = torch.linspace(0, 60, 500)[:, None]
    else:
        features = torch.randn(500, 4, generator=draw) * (1 if lines == "short" else 300)
    values = torch.randn(500, 4, generator=draw)
    result = ops.Lattice(features).filter(values)
    torch.testing.assert_close(result, reference.Lattice(features).filter(values), rtol=1e-5, atol=1e-5)


def test_keys_of_two_words():
    """Positions so wide apart that a vertex's coordinates need more than 64 bits."""
    draw = torch.Generator().manual_seed(2)
    features = torch.randn(200, 5, generator=draw) * 3e4
    features[100:] = features[:100] + torch.randn(100, 5, generator=draw) * 0.2
    values = torch.randn(200, 5, generator=draw)
    result = ops.Lattice(features).filter(values)
    torch.testing.assert_close(result, reference.Lattice(features).filter(values), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(result[:100], ops.Lattice(features[:100]).filter(values[:100]))


def test_filled_as_pydensecrf():
    features, _ = points(41, 2)
    values = torch.ones(41, 1)
    far = ops.Lattice(features + 20, filled=True).filter(values)  # the origin is no point's neighbour
    assert torch.equal(far, ops.Lattice(features + 20).filter(values))
    near = torch.tensor([[0.9, 0.4]]).repeat(41, 1) * torch.linspace(0.2, 3, 41)[:, None]
    plain, filled = ops.Lattice(near).filter(values), ops.Lattice(near, filled=True).filter(values)
    expected = reference.Lattice(near, filled=True).filter(values)
    torch.testing.assert_close(filled, expected, rtol=1e-5, atol=1e-5)
    assert (filled - plain).abs().max() > 1e-4
    whole = ops.Lattice(near[:40], filled=True).filter(values[:40])
    assert torch.equal(ops.Lattice(near[:40]).filter(values[:40]), whole)


def test_threads_number_vertices_as_one_does():
    draw = torch.Generator().manual_seed(3)
    path = torch.randn(40_000, 3, generator=draw).cumsum(0) * 0.05  # neighbours share vertices, and so do far points
    before = torch.get_num_threads()
    try:
        built = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            built.append(torch.ops.ribfast.lattice(path, True))
    finally:
        torch.set_num_threads(before)
    for tensors in built[1:]:
        assert all(torch.equal(a, b) for a, b in zip(built[0], tensors, strict=True))


def test_transpose_is_the_adjoint():
    features, draw = points(200, 5)
    lattice = ops.Lattice(features)
    a, b = torch.randn(2, 200, 6, generator=draw)
    forward = (lattice.filter(a).double() * b).sum()
    backward = (a.double() * lattice.filter(b, transpose=True)).sum()
    torch.testing.assert_close(forward, backward, rtol=1e-5, atol=1e-4)


def test_gradient_equals_references():
    features, draw = points(60, 4)
    values = torch.randn(60, 5, generator=draw)
    weights = torch.randn(60, 5, generator=draw)
    gradients = []
    for lattice in (ops.Lattice(features), reference.Lattice(features)):
        leaf = values.clone().requires_grad_()
        (lattice.filter(leaf.tanh()) * weights).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_gradient_of_a_gradient():
    features, draw = points(30, 2)
    lattice = ops.Lattice(features)
    values = torch.randn(30, 2, generator=draw, requires_grad=True)
    (first,) = torch.autograd.grad((lattice.filter(values) ** 2).sum(), values, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), values)
    ones = torch.ones(30, 2)
    torch.testing.assert_close(second, 2 * lattice.filter(lattice.filter(ones), transpose=True), rtol=1e-4, atol=1e-4)


def test_opcheck():
    features, draw = points(20, 2)
    tensors = torch.ops.ribfast.lattice(features, False)
    values = torch.randn(20, 3, generator=draw, requires_grad=True)
    torch.library.opcheck(torch.ops.ribfast.lattice_filter.default, (values, tensors, False))
    torch.library.opcheck(
        torch.ops.ribfast.lattice.default, (features, False), test_utils=("test_schema", "test_autograd_registration")
    )


def test_is_a_gaussian_filter():
    """Near its kernel where points are dense: the lattice's own error is some percent."""
    side, middle = 40, 820
    y, x = torch.meshgrid(torch.arange(side) / 4.0, torch.arange(side) / 4.0, indexing="ij")
    features = torch.stack([x, y], -1).flatten(0, 1)
    impulse = torch.zeros(side * side)
    impulse[middle] = 1
    got = ops.Lattice(features).filter(impulse)
    expected = torch.exp(-(features - features[middle]).square().sum(1) / 2)
    got, expected = got / got.sum(), expected / expected.sum()
    assert (got - expected).abs().max() < 0.15 * expected.max()


def test_lattice_tensors_are_checked():
    """Raw operators do not follow indices out of their tensors."""
    features, draw = points(20, 2)
    tensors = torch.ops.ribfast.lattice(features, False)
    values = torch.randn(20, 3, generator=draw)
    for place, spoil in [(0, lambda t: t + 10**6), (0, lambda t: t - 1), (2, lambda t: t + 10**6), (3, lambda t: t + 1),
                         (1, lambda t: t[:1]), (0, lambda t: t.long())]:  # fmt: skip
        spoilt = [*tensors]
        spoilt[place] = spoil(tensors[place])
        with pytest.raises(ValueError, match="lattice_filter: expected the tensors that `lattice` returned"):
            torch.ops.ribfast.lattice_filter(values, spoilt, False)


@pytest.mark.parametrize(
    "features, error, match",
    [
        ([[1.0]], TypeError, r"expected features to be a tensor \(P, d\), got list"),
        (torch.zeros(3, 9), ValueError, "expected features of 1 to 8 dimensions"),
        (torch.zeros(3, 0), ValueError, "expected features of 1 to 8 dimensions"),
        (torch.zeros(3), ValueError, r"expected features \(P, d\), got shape \(3,\)"),
        (torch.full((3, 2), math.nan), ValueError, "expected finite features, got nan"),
        (torch.full((3, 2), 1e12), ValueError, "larger standard deviations"),
        (torch.zeros(3, 2, dtype=torch.long), TypeError, "expected features in float64"),
    ],
)
@pytest.mark.skipif(os.environ.get("RIBFAST_BACKEND") == "reference", reason="says what the kernels refuse")
def test_refuses_features(features, error, match):
    with pytest.raises(error, match="lattice: .*" + match):
        ops.Lattice(features)


def test_refuses_values():
    lattice = ops.Lattice(torch.zeros(3, 2))
    for values, error in [(torch.zeros(4, 2), ValueError), (torch.zeros(3, 2, 2), ValueError), ([1], TypeError),
                          (torch.zeros(3, 2, dtype=torch.int32), TypeError)]:  # fmt: skip
        with pytest.raises(error, match="lattice_filter: expected values"):
            lattice.filter(values)
