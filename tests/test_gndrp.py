import math

import numpy as np
import pytest
import torch
from cases import DTYPES, MAP_SHAPES, NAMES, logits, rounding, special_maps, tolerance

from ribfast import ops, reference

MODES = [(divide_by, strict) for divide_by in ("kept", "all") for strict in (False, True)]


def both(maps, present, tau, divide_by, strict):
    """(value, gradient) of the operator and of the reference"""
    results = []
    grad = torch.linspace(-1, 2, present.numel(), device=maps.device).view(present.shape)
    for pool in (ops.gndrp, reference.gndrp):
        leaf = maps.detach().clone().requires_grad_()
        value = pool(leaf, present, tau, divide_by=divide_by, strict=strict)
        value.backward(grad.to(value.dtype))
        results.append((value.detach(), leaf.grad))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shape", MAP_SHAPES, ids=str)
@pytest.mark.parametrize("divide_by, strict", MODES)
def test_equals_reference(device, dtype, shape, divide_by, strict):
    maps = logits(shape, dtype, device)
    present = torch.rand(shape[:2], device=device) < 0.7
    (value, grad), (expected, expected_grad) = both(maps, present, 0.4, divide_by, strict)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value, expected, **tolerance(dtype))
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, expected_grad, **rounding(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("tau", [0.4, 0.0, -0.25, 1.0, 1.5, -2.0, 1e-30, 1e30])
@pytest.mark.parametrize("strict", [False, True])
def test_odd_maxima(device, dtype, tau, strict):
    maps = special_maps(dtype, device)
    present = torch.ones(1, 10, dtype=torch.bool, device=device)
    (value, grad), (expected, expected_grad) = both(maps, present, tau, "kept", strict)
    torch.testing.assert_close(value, expected, **tolerance(dtype), equal_nan=True)
    torch.testing.assert_close(grad, expected_grad, **rounding(dtype), equal_nan=True)


def test_threshold_is_exact(device):
    """Elements within a rounding of tau * maximum fall on the side where the rounded quotient does."""
    top = torch.rand(40, dtype=torch.float64).mul_(600).float()
    edge = top * 0.4
    maps = torch.zeros(1, 40, 1, 9)
    maps[0, :, 0, 8] = top
    maps[0, :, 0, 3] = edge
    for k in range(3):
        maps[0, :, 0, 4 + k] = torch.nextafter(maps[0, :, 0, 3 + k], torch.tensor(math.inf))
        maps[0, :, 0, 2 - k] = torch.nextafter(maps[0, :, 0, 3 - k], torch.tensor(-math.inf))
    maps = maps.to(device)
    present = torch.ones(1, 40, dtype=torch.bool, device=device)
    for strict in (False, True):
        (_, grad), (_, expected) = both(maps, present, 0.4, "kept", strict)
        assert torch.equal(grad != 0, expected != 0)
        assert 0 < (grad[..., :7] != 0).sum() < 40 * 7


def test_released_behaviour_by_hand(device):
    maps = torch.tensor([[[[1.0, 2.0, 4.0, 10.0]], [[1.0, 2.0, 3.0, 6.0]]]], device=device)
    present = torch.tensor([[True, False]], device=device)
    released = ops.gndrp(maps, present, 0.4, divide_by="all", strict=True)
    assert released.tolist() == [[0.75, 3.0]]  # 4 / 10 is not < 0.4
    assert ops.gndrp(maps, present, 0.4).tolist() == [[pytest.approx(7 / 3), 3.0]]


def test_nothing_kept_pools_to_zero_without_gradient(device):
    maps = torch.full((1, 2, 3, 3), 5.0, device=device, requires_grad=True)
    value = ops.gndrp(maps, torch.tensor([[True, False]], device=device))
    value.sum().backward()
    assert value.tolist() == [[0, 5]]
    assert maps.grad[0, 0].count_nonzero() == 0 and maps.grad[0, 1].count_nonzero() == 9


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_nan_stays_in_its_map(device, dtype):
    maps = logits((2, 3, 17, 19), dtype, device)
    present = torch.tensor([[True, True, False], [True, False, True]], device=device)
    clean = ops.gndrp(maps, present)
    maps[0, 1, 16, 18] = maps[1, 1, 0, 0] = math.nan
    value = ops.gndrp(maps, present)
    assert value.isnan().tolist() == [[False, True, False], [False, True, False]]
    torch.testing.assert_close(value[~value.isnan()], clean[~value.isnan()])


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)], ids=str)
def test_zero_images_and_classes(device, shape):
    maps = torch.empty(shape, device=device, requires_grad=True)
    value = ops.gndrp(maps, torch.empty(shape[:2], dtype=torch.bool, device=device))
    assert value.shape == shape[:2]
    value.sum().backward()
    assert maps.grad.shape == shape


@pytest.mark.parametrize("present", [True, False])
def test_large_maps_lose_nothing(device, present):
    """A plain float32 sum of a million equal numbers is off by a tenth of a percent."""
    maps = torch.full((1, 1, 1024, 1024), 0.1, device=device)
    maps[0, 0, 0, 0] = 1
    value = ops.gndrp(maps, torch.tensor([[present]], device=device)).item()
    assert value == pytest.approx(0.1, rel=2e-5)


def test_any_strides(device):
    maps = logits((3, 4, 6, 10), torch.float32, device)
    present = torch.rand(4, 3, device=device).t() < 0.7
    expected = ops.gndrp(maps, present.contiguous())
    assert torch.equal(ops.gndrp(maps.to(memory_format=torch.channels_last), present), expected)
    wide = torch.zeros(3, 4, 6, 20, device=device)
    wide[..., ::2] = maps
    assert torch.equal(ops.gndrp(wide[..., ::2], present), expected)


def test_gradcheck(device):
    maps = logits((2, 3, 4, 5), torch.float64, device).requires_grad_()
    present = torch.tensor([[True, False, True], [True, True, False]], device=device)
    for divide_by, strict in MODES:

        def pool(maps, divide_by=divide_by, strict=strict):
            return ops.gndrp(maps, present, divide_by=divide_by, strict=strict)

        assert torch.autograd.gradcheck(pool, (maps,))
        assert torch.autograd.gradgradcheck(pool, (maps,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_opcheck(device, dtype):
    maps = logits((2, 3, 8, 9), dtype, device).requires_grad_()
    present = torch.tensor([[True, False, True], [True, True, False]], device=device)
    torch.library.opcheck(torch.ops.ribfast.gndrp.default, (maps, present, 0.4, False, False))
    pooled, stats = torch.ops.ribfast.gndrp(maps.detach(), present, 0.4, False, False)
    torch.library.opcheck(
        torch.ops.ribfast.gndrp_backward.default, (torch.ones_like(pooled), maps.detach(), present, stats, 0.4, False)
    )


def test_compiles_without_graph_breaks(device):
    maps, present = logits((2, 3, 8, 9), torch.float32, device), torch.ones(2, 3, dtype=torch.bool, device=device)
    compiled = torch.compile(lambda m, p: ops.gndrp(m * 2, p), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(maps, present), ops.gndrp(maps * 2, present))
    grads = []
    for pool in (compiled, lambda m, p: ops.gndrp(m * 2, p)):
        leaf = maps.clone().requires_grad_()
        pool(leaf, present).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
    compiled = torch.compile(lambda m, p, t: ops.gndrp(m, p, t), fullgraph=True, backend="aot_eager")
    for tau, height in ((0.5, 8), (0.6, 10), (0.7, 12)):  # numbers and sizes that change become symbolic
        maps = logits((2, 3, height, 9), torch.float32, device)
        torch.testing.assert_close(compiled(maps, present, tau), ops.gndrp(maps, present, tau))


def test_autocast_reads_16_bit_and_sums_in_float32(device):
    maps, present = logits((2, 3, 40, 41), torch.bfloat16, device), torch.ones(2, 3, dtype=torch.bool, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        value = ops.gndrp(maps, present)
    assert value.dtype == torch.float32
    assert torch.equal(value, ops.gndrp(maps, present))


def refused(error, match, *args, **kwargs):
    with pytest.raises(error, match=match):
        ops.gndrp(*args, **kwargs)


def test_refuses_bad_input():
    maps, present = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, dtype=torch.bool)
    refused(ValueError, r"gndrp: expected maps \(N, C, H, W\), got shape \(2, 3, 4\)", maps[..., 0], present)
    refused(ValueError, r"at least one row and column, got shape \(2, 3, 0, 5\)", maps[:, :, :0], present)
    refused(ValueError, r"present of shape \(2, 3\), the maps' \(N, C\), got \(2, 2\)", maps, present[:, :2])
    refused(TypeError, "present to be a bool tensor .* got torch.float32", maps, present.float())
    refused(TypeError, "present to be a bool tensor .* got list", maps, [[True]])
    refused(TypeError, "maps to be a tensor .* got list", [1.0], present)
    refused(TypeError, "float64, float32, float16 or bfloat16, got torch.int64", maps.long(), present)
    for tau in (math.nan, math.inf, -math.inf):
        refused(ValueError, "tau to be a finite number", maps, present, tau)
    refused(TypeError, "tau to be a number, got str", maps, present, "0.4")
    refused(TypeError, "tau to be a number, got ndarray", maps, present, np.array([0.4, 0.5]))
    refused(ValueError, "divide_by to be 'kept' or 'all', got 'some'", maps, present, divide_by="some")
    refused(ValueError, "one device, got cpu and meta", maps, present.to("meta"))


def test_dispatched_operator_checks_too(device):
    maps, present = torch.zeros(2, 3, 4, 5, device=device), torch.zeros(2, 3, dtype=torch.bool, device=device)
    with pytest.raises((ValueError, TypeError), match="gndrp: expected"):
        torch.ops.ribfast.gndrp(maps.int(), present, 0.4, False, False)
    with pytest.raises((ValueError, TypeError), match="gndrp: expected"):
        torch.ops.ribfast.gndrp(maps, present[:1], 0.4, False, False)
