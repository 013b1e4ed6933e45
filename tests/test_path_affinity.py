"""path_affinity: kernels against the specification."""

import math

import pytest
import torch
from cases import rounding

from ribfast import ops, reference

SIZES = [(1, 1), (1, 40), (3, 2), (17, 33), (2, 129)]


def boundaries(count, height, width, device="cpu"):
    return torch.rand(count, height, width, dtype=torch.float64).float().to(device)


def test_offsets_and_paths_by_hand():
    assert ops.pair_offsets(2) == [(0, 1), (1, -1), (1, 0), (1, 1)]
    assert len(ops.pair_offsets(5)) == 34 and len(ops.pair_offsets(10)) == 152
    assert reference.path(0, 3) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert reference.path(2, -1) == [(0, -1), (0, 0), (1, -1), (1, 0), (2, -1), (2, 0)]  # all closer than 1 to the line
    assert reference.path(3, 3) == [(y, x) for y in range(4) for x in range(4) if abs(y - x) <= 1]


def test_by_hand(device):
    boundary = torch.tensor([[0.1, 0.6, 0.2]], device=device)
    found = ops.path_affinity(boundary, 3)
    offsets = ops.pair_offsets(3)
    torch.testing.assert_close(found[offsets.index((0, 1)), 0].cpu(), torch.tensor([0.4, 0.4, 0.0]))
    torch.testing.assert_close(found[offsets.index((0, 2)), 0].cpu(), torch.tensor([0.4, 0.0, 0.0]))
    assert found[2:].count_nonzero() == 0  # there is nothing below
    squared = ops.path_affinity(boundary, 3, beta=2)
    torch.testing.assert_close(squared, found**2)


@pytest.mark.parametrize("radius, size", [(r, size) for r in (2, 5, 10) for size in SIZES] + [(16, (17, 33))], ids=str)
def test_equals_the_specification(device, radius, size):
    boundary = boundaries(2, *size, device)
    for beta in (1.0, 10.0, 2.5):
        leaf, exact = boundary.clone().requires_grad_(), boundary.double().requires_grad_()
        found, expected = ops.path_affinity(leaf, radius, beta), reference.path_affinity(exact, radius, beta)
        assert found.shape == (2, len(ops.pair_offsets(radius)), *size) and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-6)
        grad = torch.rand_like(found)
        found.backward(grad)
        expected.backward(grad.double())
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2e-5, atol=1e-5 * beta)


def test_gradient_goes_to_the_first_of_equals(device):
    boundary = torch.full((1, 4, 6), 0.5, device=device, requires_grad=True)
    exact = boundary.detach().cpu().double().requires_grad_()  # the CPU's max, which takes the first
    ops.path_affinity(boundary, 3).sum().backward()
    reference.path_affinity(exact, 3).sum().backward()
    torch.testing.assert_close(boundary.grad.cpu().double(), exact.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_types_and_strides(device, dtype):
    boundary = boundaries(2, 9, 21, device).to(dtype)
    leaf = boundary.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    found = ops.path_affinity(leaf, 5, 3.0)
    assert torch.equal(found, ops.path_affinity(boundary.float(), 5, 3.0))
    found.sum().backward()
    exact = boundary.double().requires_grad_()
    reference.path_affinity(exact, 5, 3.0).sum().backward()
    if dtype != torch.float16 and dtype != torch.bfloat16:  # which hold many equals
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(leaf.grad.double().sum(), exact.grad.sum(), **(rounding(dtype) | {"atol": 1.0}))


def test_nan_stays_on_the_paths_that_hold_it(device):
    boundary = boundaries(2, 12, 20, device)
    clean = ops.path_affinity(boundary, 4)
    boundary[0, 6, 9] = math.nan
    found = ops.path_affinity(boundary, 4)
    expected = reference.path_affinity(boundary, 4).isnan()
    assert torch.equal(found.isnan(), expected) and 0 < expected.sum() < expected[0].numel() / 2
    assert torch.equal(found[~expected], clean[~expected])


def test_empty_batch(device):
    leaf = torch.empty(0, 4, 5, device=device, requires_grad=True)
    found = ops.path_affinity(leaf, 3)
    assert found.shape == (0, 12, 4, 5)
    found.sum().backward()
    assert leaf.grad.shape == (0, 4, 5)


def test_opcheck(device):
    leaf = boundaries(2, 7, 9, device).requires_grad_()
    torch.library.opcheck(torch.ops.ribfast.path_affinity.default, (leaf, 3, 2.0))
    grad = torch.rand(2, 12, 7, 9, device=device)
    # no fixed order of sums on a GPU
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(
        torch.ops.ribfast.path_affinity_backward.default, (grad, leaf.detach(), 3, 2.0), test_utils=tests
    )


def refused(error, match, *args):
    with pytest.raises(error, match=match):
        ops.path_affinity(*args)


def test_refuses_bad_input(device):
    boundary = boundaries(2, 7, 9, device)
    refused(TypeError, "boundary to be a tensor", [0.5])
    refused(TypeError, "got torch.int64", boundary.long())
    refused(ValueError, r"boundary \(N, h, w\) or \(h, w\), got shape \(1, 2, 7, 9\)", boundary[None])
    refused(ValueError, "at least one row and column", boundary[:, :0])
    refused(TypeError, "radius to be an integer, got float", boundary, 5.0)
    refused(ValueError, "radius from 2 to 16, got 1", boundary, 1)
    refused(ValueError, "radius from 2 to 16, got 17", boundary, 17)
    refused(ValueError, "beta above 0, got 0", boundary, 5, 0)
    refused(ValueError, "beta to be a finite number of at least 0, got nan", boundary, 5, math.nan)
    with pytest.raises((ValueError, TypeError), match="path_affinity: expected"):
        torch.ops.ribfast.path_affinity(boundary[0], 5, 1.0)
