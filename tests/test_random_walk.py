"""random_walk: against the dense matrix, and against the numbers of IRN's released implementation."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import NAMES

from ribfast import ops, reference

GOLDEN = Path(__file__).parent / "golden" / "walk.npz"


def dense(cams, boundary, *, beta=10.0, log2_steps=8, radius=5):
    """The specification in float64."""
    boundary = boundary.double()
    affinity = reference.path_affinity(boundary[None], radius, beta)[0]
    return reference.random_walk(cams.double() * (1 - boundary), affinity, 2**log2_steps)


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * max(1e-3, expected.max().item()))


def drawn(channels, height, width, device="cpu"):
    return torch.rand(channels, height, width).to(device), (torch.rand(height, width) ** 2).to(device)


@pytest.mark.parametrize("case", range(4))
def test_equals_the_released_numbers(device, case):
    with np.load(GOLDEN) as file:
        data = {key[2:]: torch.from_numpy(file[key]) for key in file.files if key.startswith(f"{case}_")}
    options = dict(beta=data["beta"].item(), log2_steps=data["times"].item(), radius=data["radius"].item())
    cams, boundary = data["cam"].to(device), data["edge"][0].to(device)
    found = ops.random_walk(cams, boundary, **options)
    torch.testing.assert_close(found.cpu(), data["rw"], rtol=0, atol=3e-4 * data["rw"].max().item())
    close(found, dense(cams, boundary, **options))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2), (15, 33), (21, 16)], ids=str)
@pytest.mark.parametrize("radius, log2_steps", [(2, 8), (5, 0), (5, 1), (5, 6), (5, 8), (9, 7), (16, 8)])
def test_equals_the_dense_matrix(device, size, radius, log2_steps):
    for channels in (1, 2, 3, 6):
        cams, boundary = drawn(channels, *size, device)
        found = ops.random_walk(cams, boundary, radius=radius, log2_steps=log2_steps)
        close(found, dense(cams, boundary, radius=radius, log2_steps=log2_steps))


def test_series_equals_single_steps(device):
    """Hundreds of plain steps one after another, where a dense matrix would be too large."""
    cams, boundary = drawn(2, 60, 130, device)
    found = ops.random_walk(cams, boundary)
    affinity, step = ops.path_affinity(boundary, 5, 10.0), cams * (1 - boundary)
    for _ in range(256):
        step = ops.random_walk(step, affinity=affinity, beta=1, log2_steps=0)
    torch.testing.assert_close(found, step, rtol=0, atol=1e-5 * step.max().item())


def test_even_maps_stay_even(device):
    """To the last bit: what a step does is a mean."""
    boundary = torch.rand(40, 70, device=device)
    affinity = ops.path_affinity(boundary, 5)
    found = ops.random_walk(torch.full((1, 40, 70), 0.3, device=device), affinity=affinity)
    assert (found == found[0, 0, 0]).all() and found[0, 0, 0] == pytest.approx(0.3, rel=1e-6)


def test_walls_are_not_crossed(device):
    boundary = torch.zeros(20, 41, device=device)
    boundary[:, 20] = 1
    cams = torch.zeros(1, 20, 41, device=device)
    cams[0, :, :5] = 1
    found = ops.random_walk(cams, boundary)
    assert found[0, :, :20].min() > 0.05 and found[0, :, 20:].max() == 0


def test_images_of_any_sizes(device):
    pairs = [drawn(c, h, w, device) for c, h, w in ((2, 9, 30), (1, 20, 7), (5, 12, 12), (0, 8, 8))]
    found = ops.random_walk([cams for cams, _ in pairs], [boundary for _, boundary in pairs])
    for value, (cams, boundary) in zip(found, pairs, strict=True):
        assert torch.equal(value, ops.random_walk(cams, boundary))
    cams, boundaries = torch.rand(3, 2, 14, 19, device=device), torch.rand(3, 14, 19, device=device)
    stacked = ops.random_walk(cams, boundaries)
    assert stacked.shape == cams.shape
    assert torch.equal(stacked[1], ops.random_walk(cams[1], boundaries[1]))
    assert ops.random_walk([], []) == []
    assert ops.random_walk(cams[:0], boundaries[:0]).shape == (0, 2, 14, 19)


def test_other_affinities(device):
    """PSA's: of features, at any stride, to the power 8."""
    features, (cams, _) = torch.rand(6, 11, 13), drawn(2, 11, 13, device)
    affinity = torch.zeros(34, 11, 13)
    for plane, (y, x) in zip(affinity, ops.pair_offsets(5), strict=True):
        for v in range(11 - y):
            for u in range(max(0, -x), 13 - max(0, x)):
                plane[v, u] = (-(features[:, v, u] - features[:, v + y, u + x]).abs().mean()).exp()
    affinity = affinity.to(device)
    expected = reference.random_walk(cams.double(), affinity.double() ** 8, 256)
    close(ops.random_walk(cams, affinity=affinity, beta=8), expected)
    everywhere = torch.where(affinity == 0, 0.5, affinity)  # what pairs that leave the map have is not read
    assert torch.equal(
        ops.random_walk(cams, affinity=everywhere, beta=8), ops.random_walk(cams, affinity=affinity, beta=8)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=NAMES.get)
def test_other_types_and_strides(device, dtype):
    cams, boundary = drawn(2, 9, 21, device)
    cams, boundary = cams.to(dtype), boundary.to(dtype)
    turned = ops.random_walk(cams.mT.contiguous().mT, boundary.mT.contiguous().mT)
    assert turned.dtype == torch.float32
    assert torch.equal(turned, ops.random_walk(cams, boundary))
    expected = dense(cams.float() * (1 - boundary.float()) / (1 - boundary.float()).clamp(min=1e-9), boundary.float())
    torch.testing.assert_close(turned.double(), expected, rtol=0, atol=0.02 * expected.max().item())


def test_results_do_not_depend_on_threads():
    cams, boundary = drawn(3, 30, 50)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found += [ops.random_walk(cams, boundary), ops.random_walk([cams] * 4, [boundary] * 4)[2]]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_opcheck(device):
    (cams, boundary), (more, other) = drawn(2, 7, 9, device), drawn(1, 5, 6, device)
    weights = [ops.path_affinity(b, 3, 2.0) for b in (boundary, other)]
    torch.library.opcheck(torch.ops.ribfast.random_walk.default, ([cams, more], weights, 3, 16))


def test_refuses_a_gradient(device):
    cams, boundary = drawn(1, 6, 7, device)
    with pytest.raises(RuntimeError, match="random_walk: expected tensors that need no gradient"):
        ops.random_walk(cams.requires_grad_(), boundary)


def refused(error, match, *args, **kwargs):
    with pytest.raises(error, match=match):
        ops.random_walk(*args, **kwargs)


def test_refuses_bad_input(device):
    cams, boundary = drawn(2, 7, 9, device)
    affinity = ops.path_affinity(boundary, 5)
    refused(ValueError, "either boundary or affinity, got none", cams)
    refused(ValueError, "either boundary or affinity, got both", cams, boundary, affinity=affinity)
    refused(TypeError, "two tensors or two lists, got Tensor and list", cams, [boundary])
    refused(ValueError, r"cams \(C, h, w\) and boundary \(h, w\)", cams, boundary[None])
    refused(ValueError, r"boundary of shape \(7, 9\) for cams \(2, 7, 9\)", cams, boundary[:6])
    refused(ValueError, r"affinity of shape \(12, 7, 9\) .* radius 3", cams, affinity=affinity, radius=3)
    refused(ValueError, "a boundary for each image, got 2 for 1", [cams], [boundary, boundary])
    refused(ValueError, "log2_steps from 0 to 16, got 40", cams, boundary, log2_steps=40)
    refused(TypeError, "log2_steps to be an integer, got float", cams, boundary, log2_steps=8.0)
    refused(ValueError, "radius from 2 to 16, got 1", cams, boundary, radius=1)
    refused(
        ValueError,
        r"boundary in \[0, 1\], got 0.* to 1.5",
        cams,
        torch.where(boundary == boundary.max(), 1.5, boundary),
    )
    refused(ValueError, r"boundary in \[0, 1\]", cams, torch.full_like(boundary, math.nan))
    refused(ValueError, "finite cams, got NaN or infinity", torch.full_like(cams, math.inf), boundary)
    refused(ValueError, "at least one row and column", cams[:, :0], boundary[:0])
    with pytest.raises((ValueError, TypeError), match="random_walk: expected"):
        torch.ops.ribfast.random_walk([cams], [affinity], 4, 16)
