"""pair_losses: kernels against the specification."""

import math

import pytest
import torch

from ribfast import ops, reference

WEIGHTS = torch.tensor([1.0, 0.5, 0.3, 0.7, 2.0, 0, 0, 0])


def maps(count, height, width, device="cpu"):
    """Boundary, displacement and labels: patches of 0, 1, 2 and of what is unknown."""
    boundary, displacement = torch.rand(count, height, width), torch.randn(count, 2, height, width) * 3
    labels = torch.randint(0, 3, (count, height // 3 + 1, width // 4 + 1), dtype=torch.uint8)
    labels = labels.repeat_interleave(3, 1).repeat_interleave(4, 2)[:, :height, :width].contiguous()
    labels[torch.rand(labels.shape) < 0.2] = 255
    return boundary.to(device), displacement.to(device), labels.to(device)


def with_gradients(run, boundary, displacement, *rest):
    leaves = boundary.clone().requires_grad_(), displacement.clone().requires_grad_()
    sums = run(*leaves, *rest)
    (sums * WEIGHTS.to(sums)).sum().backward()
    return [sums.detach().double(), *(leaf.grad.double() for leaf in leaves)]


@pytest.mark.parametrize("radius", [2, 4, 10])
@pytest.mark.parametrize("size", [(1, 1), (3, 40), (17, 33), (12, 70)], ids=str)
def test_equals_the_specification(device, radius, size):
    boundary, displacement, labels = maps(2, *size, device)
    found = with_gradients(ops.pair_losses, boundary, displacement, labels, radius)
    expected = with_gradients(reference.pair_losses, boundary.double(), displacement.double(), labels, radius)
    torch.testing.assert_close(found[0], expected[0], rtol=2e-5, atol=1e-5)
    assert torch.equal(found[0][5:], expected[0][5:])
    largest = max(1.0, expected[1].abs().max().item())
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5 * largest)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-4)


def test_by_hand(device):
    """Two columns of two labels with a boundary between: radius 2, pairs begin in the middle column of three."""
    boundary = torch.tensor([[[0.2, 0.8, 0.4], [0.1, 0.3, 0.5]]], device=device)
    labels = torch.tensor([[[0, 1, 1], [0, 1, 255]]], dtype=torch.uint8, device=device)
    displacement = torch.zeros(1, 2, 2, 3, device=device)
    displacement[0, 1, 0, 1] = 0.25
    sums = ops.pair_losses(boundary, displacement, labels, 2).tolist()
    # from (0, 1): to (0, 2) alike, to (1, 0) not, to (1, 1) alike, to (1, 2) unknown; 0.8 is on every path
    assert sums[5:] == [0, 2, 1]
    assert sums[1] == pytest.approx(-2 * math.log(0.2 + 1e-5), rel=1e-5)
    assert sums[2] == pytest.approx(-math.log(1 + 1e-5 - 0.2), rel=1e-5)
    assert sums[3] == pytest.approx(0.75 + 1.25) and sums[0] == sums[4] == 0


def test_nothing_known_is_zero(device):
    boundary, displacement, labels = maps(1, 20, 40, device)
    found = with_gradients(ops.pair_losses, boundary, displacement, labels.fill_(255), 4)
    assert all(part.count_nonzero() == 0 for part in found)


def test_nan_reaches_the_loss(device):
    boundary, displacement, labels = maps(1, 20, 40, device)
    labels.fill_(1)
    boundary[0, 5, 20] = math.nan
    assert ops.pair_losses(boundary, displacement, labels, 4)[1].isnan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_types(device, dtype):
    boundary, displacement, labels = maps(2, 15, 30, device)
    boundary, displacement = boundary.to(dtype), displacement.to(dtype)
    leaves = boundary.requires_grad_(), displacement.requires_grad_()
    sums = ops.pair_losses(*leaves, labels, 4)
    assert sums.dtype == torch.float32
    assert torch.equal(sums, ops.pair_losses(boundary.detach().float(), displacement.detach().float(), labels, 4))
    sums[:5].sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [dtype, dtype]
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ops.pair_losses(*leaves, labels, 4).dtype == torch.float32


def test_results_do_not_depend_on_threads():
    inputs = maps(3, 40, 40)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(with_gradients(ops.pair_losses, *inputs, 5))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_opcheck(device):
    boundary, displacement, labels = maps(2, 9, 12, device)
    leaves = boundary.requires_grad_(), displacement.requires_grad_()
    torch.library.opcheck(torch.ops.ribfast.pair_losses.default, (*leaves, labels, 3))
    inputs = (torch.rand(8, device=device), boundary.detach(), displacement.detach(), labels, 3)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(torch.ops.ribfast.pair_losses_backward.default, inputs, test_utils=tests)


def refused(error, match, *args):
    with pytest.raises(error, match=match):
        ops.pair_losses(*args)


def test_refuses_bad_input(device):
    boundary, displacement, labels = maps(2, 9, 12, device)
    refused(ValueError, r"boundary \(N, h, w\), got shape \(9, 12\)", boundary[0], displacement, labels)
    refused(ValueError, r"displacement of shape \(2, 2, 9, 12\)", boundary, displacement[:, :1], labels)
    refused(TypeError, "labels to be a uint8 tensor .* got torch.int64", boundary, displacement, labels.long())
    refused(ValueError, r"labels of shape \(2, 9, 12\)", boundary, displacement, labels[:1])
    refused(ValueError, "radius from 2 to 16, got 20", boundary, displacement, labels, 20)
    with pytest.raises((ValueError, TypeError), match="pair_losses: expected"):
        torch.ops.ribfast.pair_losses(boundary, displacement, labels.int(), 3)
