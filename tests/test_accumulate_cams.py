import math
import os

import pytest
import torch
from cases import DTYPES, NAMES, logits, needing_grad, rounding, scales, tolerance

from ribfast import ops, reference

FACTORS = (1, 0.5, 1.5, 2)
CASES = {  # size, padded
    "plain": ((63, 129), None),
    "padded": ((61, 93), (64, 96)),
    "one row": ((1, 40), None),
    "one column": ((20, 1), (32, 16)),
    "one pixel": ((1, 1), None),
}


def both(maps, size, grad=None, **options):
    """(merged, gradients) of the operator and of the reference"""
    results = []
    for merge in (ops.accumulate_cams, reference.accumulate_cams):
        leaves = needing_grad(maps)
        merged = merge(leaves, size, **options)
        merged.backward(torch.ones_like(merged) if grad is None else grad.to(merged))
        results.append((merged.detach(), [leaf.grad for leaf in leaves]))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("relu", [True, False])
def test_equals_reference(device, dtype, case, views, relu):
    size, padded = CASES[case]
    maps = scales(size, FACTORS, 3, dtype, device, views)
    grad = torch.rand(3, *size, device=device)
    (merged, grads), (expected, expected_grads) = both(maps, size, grad, padded=padded, relu=relu)
    assert merged.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(merged, expected, **tolerance(dtype))
    for got, want in zip(grads, expected_grads, strict=True):
        assert got.dtype == dtype
        widest = want.abs().max().clamp(min=1).item()
        close = rounding(dtype)
        torch.testing.assert_close(got, want, rtol=close["rtol"], atol=close["atol"] * widest)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_any_number_of_scales(device, count):
    maps = scales((33, 47), [1 + k / 3 for k in range(count)], 2, torch.float32, device)
    (merged, grads), (expected, expected_grads) = both(maps, (33, 47))
    torch.testing.assert_close(merged, expected, **tolerance(torch.float32))
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=NAMES.get)
@pytest.mark.parametrize("shape", [(2, 2, 90, 70), (1, 2, 30, 300), (2, 2, 300, 30), (2, 2, 20, 31)], ids=str)
def test_maps_larger_than_the_output(device, dtype, shape):
    maps = [logits(shape, dtype, device)]
    grad = torch.rand(2, 20, 31, device=device)
    (merged, grads), (expected, expected_grads) = both(maps, (20, 31), grad)
    # a position of up to 300 cells is itself rounded, by less than max(shape) eps, times the step between two cells
    step = (maps[0].max() - maps[0].min()).item() * len(maps[0])
    atol = 2 * max(shape) * torch.finfo(dtype).eps * step
    torch.testing.assert_close(merged, expected, rtol=0, atol=atol)
    torch.testing.assert_close(grads[0], expected_grads[0], rtol=0, atol=atol)


def test_mirrored_view_is_turned_back(device):
    view = logits((1, 2, 5, 7), torch.float32, device)
    merged = ops.accumulate_cams([torch.cat([view, view.flip(-1)])], (20, 30))
    torch.testing.assert_close(merged, 2 * ops.accumulate_cams([view], (20, 30)))


def test_padded_is_cut_not_squeezed(device):
    maps = scales((61, 93), FACTORS, 2, torch.float32, device)
    whole = ops.accumulate_cams(maps, (64, 96))
    torch.testing.assert_close(ops.accumulate_cams(maps, (61, 93), padded=(64, 96)), whole[:, :61, :93])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=NAMES.get)
def test_adds_into_out(device, dtype):
    maps = scales((33, 47), (*FACTORS, 3), 2, dtype, device)
    out = logits((2, 33, 47), dtype, device)
    expected = out + ops.accumulate_cams(maps, (33, 47))
    assert ops.accumulate_cams(maps, (33, 47), out=out) is out
    torch.testing.assert_close(out, expected, **tolerance(dtype))
    turned = torch.zeros(2, 47, 33, dtype=dtype, device=device).transpose(1, 2)
    assert ops.accumulate_cams(maps, (33, 47), out=turned) is turned
    torch.testing.assert_close(turned, ops.accumulate_cams(maps, (33, 47)))


def test_out_keeps_the_gradient(device):
    maps = needing_grad(scales((12, 15), (1, 2), 2, torch.float32, device))
    total = torch.zeros(2, 12, 15, device=device)
    for _ in range(2):
        ops.accumulate_cams(maps, (12, 15), out=total)
    total.sum().backward()
    (_, grads), _ = both(maps, (12, 15))
    for leaf, grad in zip(maps, grads, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * grad)


def test_batch_of_different_images(device):
    sizes = [(33, 47), (20, 64), (33, 47), (1, 9)]
    padded = [(48, 48), (32, 64), (33, 47), (16, 16)]
    factors = [FACTORS, (1,), (1, 0.5, 1.5, 2, 3, 0.25), (2, 1)]
    batch = [
        needing_grad(scales(size, f, channels, torch.float32, device))
        for size, f, channels in zip(sizes, factors, (3, 1, 2, 4), strict=True)
    ]
    merged = ops.accumulate_cams_batch(batch, sizes, padded=padded)
    sum(m.square().sum() for m in merged).backward()
    for got, maps, size, pad in zip(merged, batch, sizes, padded, strict=True):
        torch.testing.assert_close(got, reference.accumulate_cams(maps, size, padded=pad), **tolerance(torch.float32))
        leaves = needing_grad(maps)
        reference.accumulate_cams(leaves, size, padded=pad).square().sum().backward()
        for leaf, expected in zip(maps, leaves, strict=True):
            torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-4, atol=1e-2)
    assert ops.accumulate_cams_batch([], []) == []


def test_larger_batch_than_one_launch_describes(device):
    batch = [scales((9, 11), (1, 2), 1, torch.float32, device) for _ in range(300)]
    merged = ops.accumulate_cams_batch(batch, [(9, 11)] * 300)
    for got, maps in zip(merged[::37], batch[::37], strict=True):
        torch.testing.assert_close(got, reference.accumulate_cams(maps, (9, 11)), **tolerance(torch.float32))


def test_gradient_of_one_result_of_a_batch(device):
    batch = [needing_grad(scales((9, 11), (1, 2), 1, torch.float32, device)) for _ in range(2)]
    ops.accumulate_cams_batch(batch, [(9, 11)] * 2)[1].sum().backward()
    assert all(leaf.grad is None or leaf.grad.count_nonzero() == 0 for leaf in batch[0])
    (_, grads), _ = both(batch[1], (9, 11))
    torch.testing.assert_close(batch[1][0].grad, grads[0])


@pytest.mark.parametrize("shape", [(2, 0, 4, 5)], ids=str)
def test_no_classes(device, shape):
    assert ops.accumulate_cams([torch.zeros(shape, device=device)], (8, 9)).shape == (0, 8, 9)


@pytest.mark.parametrize("relu", [True, False])
def test_nan_stays_in_its_class(device, relu):
    maps = scales((20, 40), FACTORS, 3, torch.float32, device)
    clean = ops.accumulate_cams(maps, (20, 40), relu=relu)
    maps[2][1, 1, 1, 1] = math.nan
    merged = ops.accumulate_cams(maps, (20, 40), relu=relu)
    expected = reference.accumulate_cams(maps, (20, 40), relu=relu)
    assert torch.equal(merged.isnan(), expected.isnan()) and merged[1].isnan().any()
    assert torch.equal(merged[[0, 2]], clean[[0, 2]])


def test_any_strides(device):
    maps = scales((30, 40), FACTORS, 3, torch.float32, device)
    expected = ops.accumulate_cams(maps, (30, 40))
    strided = [m.to(memory_format=torch.channels_last) for m in maps]
    assert torch.equal(ops.accumulate_cams(strided, (30, 40)), expected)


@pytest.mark.parametrize("relu", [True, False])
def test_gradcheck(device, relu):
    maps = needing_grad(scales((6, 9), (0.5, 1), 2, torch.float64, device, stride=3))

    def merge(*maps):
        return ops.accumulate_cams(maps, (6, 9), padded=(8, 9), relu=relu)

    assert torch.autograd.gradcheck(merge, maps)
    assert torch.autograd.gradgradcheck(merge, maps)


def test_opcheck(device):
    maps = needing_grad(scales((20, 30), (1, 2, 1), 2, torch.float32, device))
    layout = ([2, 1], [20, 30, 9, 9], [20, 30, 16, 16], True)
    torch.library.opcheck(torch.ops.ribfast.accumulate_cams.default, (maps, *layout))
    maps = [m.detach() for m in maps]
    out = [torch.zeros(2, 20, 30, device=device), torch.zeros(2, 9, 9, device=device)]
    torch.library.opcheck(torch.ops.ribfast.accumulate_cams_.default, (out, maps, layout[0], *layout[2:]))
    torch.library.opcheck(torch.ops.ribfast.accumulate_cams_backward.default, (out, maps, layout[0], *layout[2:]))


def test_compiles_without_graph_breaks(device):
    maps = scales((20, 30), (1, 2), 2, torch.float32, device)
    compiled = torch.compile(lambda *m: ops.accumulate_cams(m, (20, 30)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*maps), ops.accumulate_cams(maps, (20, 30)))
    leaves, expected = needing_grad(maps), needing_grad(maps)
    compiled(*leaves).square().sum().backward()
    ops.accumulate_cams(expected, (20, 30)).square().sum().backward()
    for leaf, other in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad)

    def enlarged(maps, total):
        size = (maps.shape[2] * 4, maps.shape[3] * 4)
        return ops.accumulate_cams([maps], size, out=total) if total is not None else ops.accumulate_cams([maps], size)

    compiled = torch.compile(enlarged, fullgraph=True, backend="aot_eager")
    for side in (5, 6, 7):  # sizes that change become symbolic
        maps = logits((2, 3, side, 8), torch.float32, device)
        torch.testing.assert_close(compiled(maps, None), enlarged(maps, None))
        totals = [torch.ones(3, side * 4, 32, device=device) for _ in range(2)]
        compiled(maps, totals[0]), enlarged(maps, totals[1])
        torch.testing.assert_close(*totals)


def test_autocast_promotes_mixed_scales(device):
    maps = scales((20, 30), (1, 2), 2, torch.float32, device)
    mixed = [maps[0].bfloat16(), maps[1]]
    with pytest.raises(TypeError, match=r"expected maps of one dtype, got torch.bfloat16 and torch.float32"):
        ops.accumulate_cams(mixed, (20, 30))
    with torch.autocast(device, dtype=torch.bfloat16):
        merged = ops.accumulate_cams(mixed, (20, 30))
    torch.testing.assert_close(merged, reference.accumulate_cams(mixed, (20, 30)), **tolerance(torch.float32))


def refused(error, match, *args, **kwargs):
    with pytest.raises(error, match=match):
        ops.accumulate_cams(*args, **kwargs)


def test_refuses_bad_input():
    maps = [torch.zeros(2, 3, 4, 5)]
    refused(ValueError, "accumulate_cams: expected at least one scale, got an empty sequence", [], (8, 8))
    refused(TypeError, "a sequence of maps, one .* for each scale, got Tensor", maps[0], (8, 8))
    refused(ValueError, r"each scale's maps \(V, C, h, w\), got shape \(3, 4, 5\)", [maps[0][0]], (8, 8))
    refused(ValueError, r"1 or 2 views .* got shape \(3, 3, 4, 5\)", [torch.zeros(3, 3, 4, 5)], (8, 8))
    refused(ValueError, "same number of classes at every scale, got 3 and 2", [*maps, maps[0][:, :2]], (8, 8))
    refused(ValueError, "at least one row and column", [maps[0][..., :0]], (8, 8))
    refused(TypeError, "float16 or bfloat16, got torch.uint8", [maps[0].byte()], (8, 8))
    refused(TypeError, "one dtype, got torch.float32 and torch.float64", [*maps, maps[0].double()], (8, 8))
    refused(ValueError, "one device, got cpu and meta", [*maps, maps[0].to("meta")], (8, 8))
    refused(ValueError, r"size to be \(H, W\), got 8", maps, 8)
    refused(TypeError, r"pair of integers \(H, W\), got \(8.5, 8\)", maps, (8.5, 8))
    refused(ValueError, r"size of at least \(1, 1\) .*, got \(0, 8\)", maps, (0, 8))
    refused(ValueError, r"at most 2\^24 a side, got", maps, (2**63, 8))
    mixed = [torch.zeros(1, 1, 2, 2, device="meta"), torch.zeros(1, 1, 2, 2, device="meta").half()]
    refused(TypeError, "expected maps of one dtype", mixed, (8, 8))
    refused(ValueError, r"padded of at least the size \(8, 8\), got \(16, 7\)", maps, (8, 8), padded=(16, 7))
    refused(ValueError, r"out of shape \(3, 8, 8\), got \(3, 8, 9\)", maps, (8, 8), out=torch.zeros(3, 8, 9))
    refused(TypeError, "out in torch.float32, got torch.float16", maps, (8, 8), out=torch.zeros(3, 8, 8).half())
    with pytest.raises(ValueError, match="a size for each of 2 images, got 1"):
        ops.accumulate_cams_batch([maps, maps], [(8, 8)])
    with pytest.raises(ValueError, match="an out for each of 1 images, got 0"):
        ops.accumulate_cams_batch([maps], [(8, 8)], out=[])


def test_adding_into_out_is_seen_by_autograd(device):
    weight, total = torch.ones(1, device=device, requires_grad=True), torch.ones(1, 4, 4, device=device)
    loss = (weight * total).sum()
    ops.accumulate_cams([torch.ones(1, 1, 2, 2, device=device)], (4, 4), out=total)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif("RIBFAST_BACKEND" in os.environ, reason="the compiled operators look at memory, Triton's do not")
def test_refuses_memory_that_is_shared(device):
    maps, total = torch.ones(1, 1, 4, 6, device=device), torch.zeros(1, 40, 40, device=device)
    with pytest.raises(ValueError, match="expected every out in memory of its own, got two that share some"):
        ops.accumulate_cams_batch([[maps], [maps]], [(40, 40)] * 2, out=[total, total])
    with pytest.raises(ValueError, match="expected out in memory of its own, got one that shares some with a map"):
        ops.accumulate_cams([maps], (4, 6), out=maps[0])
    two = torch.zeros(2, 40, 40, device=device)  # neighbours in memory are apart
    ops.accumulate_cams_batch([[maps], [maps]], [(40, 40)] * 2, out=[two[:1], two[1:]])
    assert torch.equal(two[0], two[1]) and two.min() > 0


def test_inplace_operator_refuses_a_gradient(device):
    maps = needing_grad([torch.zeros(1, 1, 2, 2, device=device)])
    with pytest.raises(RuntimeError, match="accumulate_cams: expected tensors that need no gradient"):
        torch.ops.ribfast.accumulate_cams_([torch.zeros(1, 4, 4, device=device)], maps, [1], [4, 4], True)
