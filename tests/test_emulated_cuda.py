"""The CUDA kernels themselves, run on the CPU (tests/emulator): what they compute, where there is no GPU to ask.

Threads are scheduled in several orders; a result that depends on the order is a race.
"""

import ctypes
import math

import pytest
import torch
from cases import DTYPES, NAMES, logits, needing_grad, rounding, scales, special_maps, tolerance
from cuda_toolkit import CUDA_INCLUDE, NO_CUDA_INCLUDE, emulated

from ribfast import ops, reference

pytestmark = pytest.mark.skipif(CUDA_INCLUDE is None, reason=NO_CUDA_INCLUDE)
STORAGE = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
ORDERS = (0, 1, 7)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return emulated("kernels", tmp_path_factory.mktemp("emulator"))


def at(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def pointers(tensors):
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def integers(kind, values):
    return (kind * len(values))(*values)


def same_in_every_order(run):
    first, *others = [run(order) for order in ORDERS]
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a.nan_to_num(nan=123), b.nan_to_num(nan=123))
    return first


def gndrp(kernels, maps, present, grad, tau, divide_by, strict, wide):
    """(pooled, gradient)"""
    count, n = present.numel(), maps.shape[2] * maps.shape[3]
    accumulator = reference.accumulator_dtype(maps.dtype)
    grad = grad.to(accumulator)

    def run(order):
        pooled = torch.full(present.shape, torch.nan, dtype=accumulator)
        stats = torch.full((*present.shape, 2), torch.nan, dtype=accumulator)
        result = torch.full_like(maps, torch.nan)
        geometry = (ctypes.c_int64(count), ctypes.c_int64(n), ctypes.c_double(tau))
        head = (STORAGE[maps.dtype], wide, order)
        kernels.gndrp(*head, at(maps), at(present), *geometry, divide_by == "all", strict, at(pooled), at(stats))
        kernels.gndrp_backward(*head, at(grad), at(maps), at(present), at(stats), *geometry, strict, at(result))
        return pooled, result

    return same_in_every_order(run)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(
    "shape, wide",
    [((2, 2, 32, 32), True), ((1, 2, 100, 96), True), ((1, 2, 5, 13), False), ((1, 1, 1, 1), False),
     ((1, 2, 97, 95), False)],
    ids=str,
)  # fmt: skip
def test_gndrp(kernels, dtype, shape, wide):
    maps, present = logits(shape, dtype), torch.rand(shape[:2]) < 0.7
    present[0, 0] = True
    grad = torch.randn(shape[:2])
    for divide_by, strict in [("kept", False), ("all", True)]:
        leaf = maps.clone().requires_grad_()
        expected = reference.gndrp(leaf, present, divide_by=divide_by, strict=strict)
        expected.backward(grad.to(expected.dtype))
        pooled, result = gndrp(kernels, maps, present, grad, 0.4, divide_by, strict, wide)
        torch.testing.assert_close(pooled, expected.detach(), **tolerance(dtype))
        torch.testing.assert_close(result, leaf.grad, **rounding(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("tau", [0.4, 0.0, -0.25, 1.5])
def test_gndrp_odd_maxima(kernels, dtype, tau):
    maps = special_maps(dtype)
    maps[0, 9, 3, 3] = torch.nan
    present = torch.ones(1, 10, dtype=torch.bool)
    leaf = maps.clone().requires_grad_()
    expected = reference.gndrp(leaf, present, tau)
    expected.backward(torch.ones_like(expected))
    pooled, result = gndrp(kernels, maps, present, torch.ones(1, 10), tau, "kept", False, False)
    torch.testing.assert_close(pooled, expected.detach(), **tolerance(dtype), equal_nan=True)
    torch.testing.assert_close(result, leaf.grad, **rounding(dtype), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shape, wide", [((3, 64, 64), True), ((2, 151, 129), False), ((2, 1, 1), False)], ids=str)
def test_normalize_cams(kernels, dtype, shape, wide):
    cams = torch.rand(shape).mul_(7).to(dtype)
    cams[0, -1, -1] = torch.nan
    count, n = shape[0], shape[1] * shape[2]

    def run(order):
        result = cams.clone()  # in place
        head = (STORAGE[dtype], wide, order)
        kernels.normalize_cams(
            *head, at(result), ctypes.c_int64(count), ctypes.c_int64(n), ctypes.c_double(1e-5), at(result)
        )
        return (result,)

    (result,) = same_in_every_order(run)
    torch.testing.assert_close(result, reference.normalize_cams(cams), **rounding(dtype), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("relu", [True, False])
def test_accumulate_cams(kernels, dtype, views, relu):
    sizes, padded = [(37, 150), (1, 9), (140, 21)], [(48, 160), (1, 9), (144, 32)]
    factors = (1, 0.5, 1.5, 8)
    images = [needing_grad(scales(size, factors, 2, dtype, "cpu", views)) for size in sizes]
    maps = [m.detach() for image in images for m in image]
    shapes = integers(ctypes.c_int64, [side for m in maps for side in m.shape])
    geometry = integers(ctypes.c_int32, [s for size, pad in zip(sizes, padded, strict=True) for s in (*size, *pad)])
    accumulator = reference.accumulator_dtype(dtype)
    for add in (False, True):

        def run(order, add=add):
            out = [torch.full((2, *size), 1.0 if add else torch.nan, dtype=accumulator) for size in sizes]
            kernels.accumulate_cams(
                STORAGE[dtype],
                order,
                len(sizes),
                len(factors),
                pointers(maps),
                shapes,
                geometry,
                pointers(out),
                relu,
                add,
            )
            return out

        for got, image, size, pad in zip(same_in_every_order(run), images, sizes, padded, strict=True):
            expected = reference.accumulate_cams(image, size, padded=pad, relu=relu).detach() + add
            torch.testing.assert_close(got, expected, **tolerance(dtype))

    grads = [torch.rand((2, *size), dtype=accumulator) for size in sizes]
    for image, size, pad, grad in zip(images, sizes, padded, grads, strict=True):
        reference.accumulate_cams(image, size, padded=pad, relu=relu).backward(grad)
    each = [i for i in range(len(sizes)) for _ in factors]
    map_geometry = integers(ctypes.c_int32, [s for i in each for s in (*sizes[i], *padded[i])])

    def run_backward(order):
        results = [torch.full_like(m, torch.nan) for m in maps]
        kernels.accumulate_cams_backward(
            STORAGE[dtype], order, len(maps), pointers(maps), shapes, map_geometry,
            pointers([grads[i] for i in each]), pointers(results), relu,
        )  # fmt: skip
        return results

    leaves = [leaf for image in images for leaf in image]
    for got, leaf in zip(same_in_every_order(run_backward), leaves, strict=True):
        close = rounding(dtype)
        widest = leaf.grad.abs().max().clamp(min=1).item()
        torch.testing.assert_close(got, leaf.grad, rtol=close["rtol"], atol=close["atol"] * widest)


def maybe(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def cells_of(shape, dtype):
    """(cells, channels) with what activations have to keep, as (1, channels, cells, 1) channels last."""
    values = torch.randn(shape).mul_(3).to(dtype)
    values.view(-1)[:: max(1, values.numel() // 5)] = torch.tensor(torch.nan)
    values.view(-1)[1 :: max(1, values.numel() // 3)] = torch.tensor(torch.inf)
    values.view(-1)[2 :: max(1, values.numel() // 4)] = torch.tensor(-torch.inf)
    return values


def on_canvas(values):
    return values.T[None, :, :, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("cells", [0, 1, 63, 129])
@pytest.mark.parametrize("channels, wide", [(1, False), (7, False), (33, False), (129, False), (8, True), (136, True)])
def test_activate(kernels, dtype, cells, channels, wide):
    y, shortcut = cells_of((cells, channels), dtype), cells_of((cells, channels), dtype)
    covering = (torch.rand(cells) < 0.7).to(dtype)
    for added in (None, shortcut):
        for mask in (None, covering):
            for limit in (torch.inf, 1.25):

                def run(order, added=added, mask=mask, limit=limit):
                    result = y.clone()
                    geometry = (ctypes.c_int64(cells), ctypes.c_int64(channels), ctypes.c_double(limit))
                    kernels.activate(STORAGE[dtype], wide, order, at(result), maybe(added), maybe(mask), *geometry)
                    return (result,)

                (result,) = same_in_every_order(run)
                expected = reference.activate(
                    on_canvas(y),
                    None if added is None else on_canvas(added),
                    None if mask is None else mask.view(1, 1, cells, 1),
                    limit,
                )
                torch.testing.assert_close(on_canvas(result), expected, **rounding(dtype), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("cells", [0, 1, 63, 129, 1100])
@pytest.mark.parametrize("channels, wide", [(1, False), (7, False), (33, False), (129, False), (8, True), (136, True)])
def test_activate_backward(kernels, dtype, cells, channels, wide):
    grad, y = torch.randn(cells, channels).to(dtype), cells_of((cells, channels), dtype)
    for limit in (torch.inf, 1.25):

        def run(order, limit=limit):
            result = torch.full_like(grad, torch.nan)
            sums = torch.full((channels,), torch.nan, dtype=reference.accumulator_dtype(dtype))
            geometry = (ctypes.c_int64(cells), ctypes.c_int64(channels), ctypes.c_double(limit))
            strips = kernels.activate_backward(
                STORAGE[dtype], wide, order, at(grad), at(y), *geometry, at(result), at(sums)
            )
            assert strips > 1 or cells < 1100
            return result, sums

        result, sums = same_in_every_order(run)
        expected, expected_sums = reference.activate_backward(on_canvas(grad), on_canvas(y), limit)
        assert torch.equal(on_canvas(result), expected)
        torch.testing.assert_close(sums, expected_sums, **tolerance(dtype))


def test_activate_backward_keeps_what_is_not_finite(kernels):
    """NaN and infinity of the gradient pass where y is inside, and nothing of them where it is not."""
    y = torch.ones(70, 4)
    y[:, 1] = 0
    grad = torch.ones(70, 4)
    grad[3, :2], grad[66, 2] = torch.nan, torch.inf
    result, sums = torch.empty(70, 4), torch.empty(4)
    geometry = (ctypes.c_int64(70), ctypes.c_int64(4), ctypes.c_double(torch.inf))
    kernels.activate_backward(1, True, 0, at(grad), at(y), *geometry, at(result), at(sums))
    torch.testing.assert_close(sums, torch.tensor([torch.nan, 0, torch.inf, 70]), equal_nan=True)
    assert result[3, 0].isnan() and result[3, 1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("n, wide", [(1, False), (9, False), (33, False), (300, False), (8193, False), (4, True),
                                     (36, True), (1152, True), (8200, True)])  # fmt: skip
def test_update_folded(kernels, dtype, first, n, wide):
    rows, scale, constants = 3 if n < 1000 else 2, 4.0, {"momentum": 0.3, "decay": 0.1}
    grads = torch.randn(rows, n).to(dtype), torch.randn(rows).to(dtype)
    anchors = torch.randn(rows, n).to(dtype), torch.randn(rows).to(dtype)
    start, norm, rate = (torch.randn(rows, n), torch.rand(2, rows) + 0.5), torch.rand(2, rows) + 0.5, torch.tensor(0.05)
    velocities = (torch.full((rows, n), torch.nan), torch.full((2, rows), torch.nan))
    if not first:
        velocities = torch.randn(rows, n), torch.randn(2, rows)
    for added in ((None, None), anchors):
        total = [g.float() / scale + (0 if a is None else a.float() / scale) for g, a in zip(grads, added, strict=True)]
        before = (None, None) if first else (velocities[0].view(rows, n, 1, 1), velocities[1])
        expected = reference.update_folded(
            total[0].view(rows, n, 1, 1), total[1], start[0].view(rows, n, 1, 1), start[1], norm,
            *before, rate=rate, **constants,
        )  # fmt: skip

        def run(order, added=added):
            now = [t.clone() for t in start]
            made = [torch.full_like(t, torch.nan) for t in now] if first else [*now]  # later steps are in place
            made += [*(v.clone() for v in velocities), *(torch.full_like(g, torch.nan) for g in grads)]
            given = [grads[0], grads[1], *added, *now, norm, rate]
            kernels.update_folded(
                STORAGE[dtype], wide, order, (ctypes.c_void_p * 8)(*[t if t is None else t.data_ptr() for t in given]),
                pointers(made), ctypes.c_int64(rows), ctypes.c_int64(n), ctypes.c_float(constants["momentum"]),
                ctypes.c_float(constants["decay"]), ctypes.c_float(scale), first,
            )  # fmt: skip
            return made

        sums = rounding(torch.float32) | {"atol": 1e-5 * max(1, math.sqrt(n) / 20)}
        for found, wanted in zip(same_in_every_order(run), expected, strict=True):
            limits = sums if found.dtype == torch.float32 else rounding(dtype)
            torch.testing.assert_close(found, wanted.view(found.shape).to(found.dtype), **limits)


def in_every_order(run):
    """Sums in no fixed order: alike but for rounding."""
    first, *others = [run(order) for order in ORDERS]
    for other in others:
        for a, b in zip(first, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4, equal_nan=True)
    return first


@pytest.mark.parametrize("radius, size", [(2, (1, 1)), (5, (11, 40)), (10, (9, 33)), (16, (3, 35))], ids=str)
@pytest.mark.parametrize("beta", [1.0, 10.0])
def test_path_affinity(kernels, radius, size, beta):
    boundary = torch.rand(2, *size)
    if size != (1, 1):
        boundary[0, 0, 4] = torch.nan
    pairs = len(ops.pair_offsets(radius))
    grad = torch.randn(2, pairs, *size)

    def run(order):
        out, result = torch.full_like(grad, torch.nan), torch.zeros_like(boundary)
        kernels.path_affinity(order, at(boundary), ctypes.c_int64(2), *size, radius, ctypes.c_float(beta), at(out),
                              at(grad), at(result))  # fmt: skip
        return out, result

    found, result = in_every_order(run)
    expected = reference.path_affinity(boundary, radius, beta)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6, equal_nan=True)
    leaf = boundary[1:].double().requires_grad_()
    reference.path_affinity(leaf, radius, beta).backward(grad[1:].double())
    torch.testing.assert_close(result[1:].double(), leaf.grad, rtol=1e-4, atol=1e-5 * beta)


@pytest.mark.parametrize("radius, size", [(2, (2, 3)), (4, (14, 45)), (10, (18, 30)), (16, (16, 31))], ids=str)
def test_pair_losses(kernels, radius, size):
    boundary, displacement = torch.rand(2, *size), torch.randn(2, 2, *size) * 3
    labels = torch.randint(0, 3, (2, *size), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < 0.2] = 255
    grads = torch.tensor([1.0, 0.5, 0.3, 0.7, 2.0, 0, 0, 0])

    def run(order):
        sums, gradients = torch.zeros(8), (torch.zeros_like(boundary), torch.zeros_like(displacement))
        kernels.pair_losses(order, at(boundary), at(displacement), at(labels), ctypes.c_int64(2), *size, radius,
                            at(sums), at(grads), *map(at, gradients))  # fmt: skip
        return sums, *gradients

    found = in_every_order(run)
    leaves = boundary.double().requires_grad_(), displacement.double().requires_grad_()
    expected = reference.pair_losses(*leaves, labels, radius)
    (expected * grads).sum().backward()
    assert expected[5:].sum() > 0
    torch.testing.assert_close(found[0].double(), expected.detach(), rtol=1e-5, atol=1e-5)
    largest = max(1.0, leaves[0].grad.abs().max().item())
    torch.testing.assert_close(found[1].double(), leaves[0].grad, rtol=1e-4, atol=1e-5 * largest)
    torch.testing.assert_close(found[2].double(), leaves[1].grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize(
    "labels, small, large",
    [(3, (1, 1), (1, 1)), (21, (4, 5), (23, 31)), (33, (2, 3), (30, 9)), (70, (5, 2), (3, 17)), (255, (2, 2), (5, 9))],
    ids=str,
)
@pytest.mark.parametrize("fit", ["none", "clamp", "ignore", "pow"])
def test_segmentation_loss(kernels, dtype, labels, small, large, fit):
    """Enlarged and reduced, more pixels in a cell than threads, labels for one warp and for several tasks of each."""
    maps = torch.randn(2, labels, *small).mul_(3).to(dtype)
    maps[0, 0] += 200  # differences whose exponentials overflow
    given = torch.randint(0, labels, (2, *large), dtype=torch.uint8)
    given[torch.rand(given.shape) < 0.2] = 255
    given[1, 0, 0] = 254 if labels < 254 else 255  # no label: ignored
    active, number = torch.tensor(fit != "none"), ["none", "clamp", "ignore", "pow"].index(fit)
    grads = torch.tensor([0.3, 2.0, 0, 0], dtype=torch.float64)
    shape = integers(ctypes.c_int32, [2, labels, *small, *large])

    def run(order):
        losses, sums = torch.full(large, torch.nan).expand(2, -1, -1).clone(), torch.zeros(4, dtype=torch.float64)
        result = torch.full_like(maps, torch.nan)
        kernels.segmentation_loss(
            STORAGE[dtype], order, at(maps), at(given), shape, at(active), number, ctypes.c_float(0.5), at(losses),
            at(sums), at(grads), at(result),
        )  # fmt: skip
        return losses, sums, result

    losses, sums, result = same_in_every_order(run)
    given = torch.where(given >= labels, 255, given)
    leaf = maps.double().requires_grad_()
    wide = torch.nn.functional.interpolate(leaf, large, mode="bilinear", align_corners=False)
    expected = torch.nn.functional.cross_entropy(wide, given.long(), ignore_index=255, reduction="none")
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=2e-5, atol=2e-5)
    groups = [given == 0, (given != 0) & (given != 255)]
    fitted = expected if fit == "none" else reference.fitted(expected, fit, 0.5)
    totals = torch.stack([fitted[group].sum() for group in groups])
    torch.testing.assert_close(sums[:2], totals.detach(), rtol=2e-4, atol=1e-4)
    assert sums[2:].tolist() == [group.sum() for group in groups]
    (totals * grads[:2]).sum().backward()
    largest = max(1.0, leaf.grad.abs().max().item())
    close = rounding(dtype)
    torch.testing.assert_close(result.double(), leaf.grad, rtol=close["rtol"], atol=close["atol"] * largest)


def erased(kernels, images, maps, which, grads, grad_areas, sharpness, level):
    """(erased, areas, gradient); grads and grad_areas may be None."""
    accumulator = reference.accumulator_dtype(maps.dtype)
    shape = integers(ctypes.c_int32, [*images.shape, *maps.shape])
    types = integers(ctypes.c_int, [STORAGE[images.dtype], STORAGE[maps.dtype]])
    last = [not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
            for t in (images, images if grads is None else grads)]  # fmt: skip
    group = integers(ctypes.c_int, [images.shape[1] if last[0] else 1, images.shape[1] if all(last) else 1])
    layout = torch.channels_last if last[0] else torch.contiguous_format

    def run(order):
        result = torch.full((len(maps), *images.shape[1:]), torch.nan, dtype=images.dtype)
        result = result.contiguous(memory_format=layout)
        areas = torch.full((len(maps),), torch.nan, dtype=accumulator)
        grad = torch.full(maps.shape, torch.nan, dtype=maps.dtype)
        strides = [*images.stride(), *result.stride(), *(result if grads is None else grads).stride(), *maps.stride()]
        kernels.erase(
            types, order, at(images), at(maps), at(which), shape, integers(ctypes.c_int64, strides), group,
            ctypes.c_double(sharpness), ctypes.c_double(level), at(result), at(areas),
            None if grads is None else at(grads), None if grad_areas is None else at(grad_areas), at(grad),
        )  # fmt: skip
        return result, areas, grad

    return same_in_every_order(run)


@pytest.mark.parametrize("layouts", ["planes", "channels_last", "mixed"])
@pytest.mark.parametrize(
    "dtype, maps_dtype",
    [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float16, torch.bfloat16),
     (torch.float32, torch.float64), (torch.float64, torch.float16)],
    ids=lambda dtype: NAMES[dtype],
)  # fmt: skip
@pytest.mark.parametrize(
    "channels, small, large",
    [(3, (1, 1), (1, 1)), (1, (3, 4), (23, 31)), (3, (2, 3), (9, 290)), (4, (9, 5), (4, 40)), (2, (35, 3), (70, 2)),
     (3, (5, 4), (5, 4))],
    ids=str,
)  # fmt: skip
def test_erase(kernels, dtype, maps_dtype, channels, small, large, layouts):
    """Enlarged and reduced, rows of more elements than threads, more rows of cells than are looked at together."""
    images = torch.randn(3, channels, *large).bfloat16().to(dtype)
    maps = torch.randn(4, *small).mul_(3).to(maps_dtype).transpose(1, 2).contiguous().transpose(1, 2)
    maps[2] = -maps[2].abs()
    which = torch.tensor([2, 0, 2, 2])
    grads = torch.randn(4, channels, *large).bfloat16().to(dtype)
    if layouts != "planes":
        images = images.contiguous(memory_format=torch.channels_last)
    if layouts == "channels_last":
        grads = grads.contiguous(memory_format=torch.channels_last)
    grad_areas = torch.randn(4).to(reference.accumulator_dtype(maps_dtype))
    found = erased(kernels, images, maps, which, grads, grad_areas, 10.0, 0.4)
    leaf = maps.double().requires_grad_()
    expected = reference.erase(images.double(), leaf, which, sharpness=10.0, level=0.4)
    torch.autograd.backward(expected, [grads.double(), grad_areas.double()])
    arithmetic = reference.accumulator_dtype(maps_dtype)
    stored = arithmetic if dtype == torch.float64 else dtype
    torch.testing.assert_close(found[0].double(), expected[0].detach(), **rounding(stored))
    close = tolerance(maps_dtype)
    torch.testing.assert_close(found[1].double(), expected[1].detach(), **close)
    largest = max(1.0, leaf.grad.abs().max().item())
    close = rounding(maps_dtype)
    torch.testing.assert_close(found[2].double(), leaf.grad, rtol=close["rtol"], atol=close["atol"] * largest)
    assert found[1][2] == 0 and found[2][2].count_nonzero() == 0


def test_erase_of_no_image_or_gradient(kernels):
    """Maps of images that there are not, with NaN, or where one of the results alone has a gradient."""
    images, maps, grad_areas = torch.randn(2, 3, 9, 11), torch.randn(3, 4, 5), torch.randn(3)
    maps[2, 1, 1] = math.nan
    grads = torch.randn(3, 3, 9, 11)
    for wrong in (-1, 2, 2**62):
        result, areas, grad = erased(kernels, images, maps, torch.tensor([wrong, 1, 0]), grads, grad_areas, 9.0, 0.5)
        assert result[0].count_nonzero() == 0 and areas[0] == 0 and grad[0].count_nonzero() == 0
        assert result[1].count_nonzero() > 0 and not result[1].isnan().any() and grad[1].count_nonzero() > 0
        assert result[2].isnan().all() and areas[2].isnan() and grad[2][~(maps[2] <= 0)].isnan().all()
    for with_grads, with_areas in ((grads, None), (None, grad_areas), (None, None)):
        *_, grad = erased(kernels, images, maps[:2], torch.tensor([1, 1]), with_grads, with_areas, 9.0, 0.5)
        leaf = maps[:2].double().requires_grad_()
        expected = reference.erase(images.double(), leaf, torch.tensor([1, 1]), sharpness=9.0)
        parts = [(given[:2].double() * result).sum() for given, result in zip((with_grads, with_areas), expected,
                 strict=True) if given is not None]  # fmt: skip
        (sum(parts) + 0 * expected[1].sum()).backward()
        torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "radius, steps, classes, sizes",
    [(5, 256, 1, [(3, 4)]), (5, 16, 4, [(9, 40), (1, 1)]), (5, 3, 2, [(17, 33)]), (9, 64, 3, [(5, 6), (2, 9)])],
    ids=str,
)
def test_random_walk(kernels, radius, steps, classes, sizes):
    cams = [torch.rand(classes, *size) for size in sizes]
    weights = [torch.rand(len(ops.pair_offsets(radius)), *size) ** 4 for size in sizes]

    def run(order):
        even, odd, results = ([torch.full_like(c, torch.nan) for c in cams] for _ in range(3))
        inverses = [torch.full(size, torch.nan) for size in sizes]
        sides = integers(ctypes.c_int32, [side for size in sizes for side in size])
        kernels.random_walk(order, len(sizes), pointers(cams), pointers(weights), sides, classes, radius,
                            ctypes.c_int64(steps), *map(pointers, (even, odd, results, inverses)))  # fmt: skip
        return results if not results[0].isnan().any() else odd if steps % 2 else even

    for found, own, weight in zip(same_in_every_order(run), cams, weights, strict=True):
        expected = reference.random_walk(own.double(), weight.double(), steps)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["par", "pamr"])
@pytest.mark.parametrize("classes, iterations", [(1, 1), (2, 2), (3, 3), (9, 1)])
def test_refine(kernels, method, classes, iterations):
    """Images of several sizes in one batch, the last with one class alone."""
    sizes, dilations = [(9, 37), (1, 1), (17, 3)], (1, 3, 12)
    images = [torch.rand(3, *size) * 255 for size in sizes]
    maps = [torch.rand(c, *size) for c, size in zip((classes, classes, 1), sizes, strict=True)]
    shapes = integers(ctypes.c_int32, [side for m in maps for side in m.shape])

    def run(order):
        results = [torch.full_like(m, torch.nan) for m in maps]
        kernels.refine(
            order, len(maps), pointers(images), pointers(maps), shapes, method == "pamr",
            integers(ctypes.c_int64, dilations), len(dilations), ctypes.c_int64(iterations), ctypes.c_float(0.3),
            ctypes.c_float(0.01), pointers(results),
        )  # fmt: skip
        return results

    for got, image, given in zip(same_in_every_order(run), images, maps, strict=True):
        options = dict(method=method, dilations=dilations, iterations=iterations)
        expected = reference.refine(image[None], given[None].double(), **options)[0]
        torch.testing.assert_close(got.double(), expected, **tolerance(torch.float32))


def test_emulated_kernels_equal_the_cpu_kernels(kernels):
    """One engine-sized case against the operator that everything else is tested with."""
    maps = scales((375, 500), (1, 0.5, 1.5, 2), 1, torch.float32)
    out = torch.full((1, 375, 500), torch.nan)
    shapes = integers(ctypes.c_int64, [side for m in maps for side in m.shape])
    kernels.accumulate_cams(
        1, 0, 1, 4, pointers(maps), shapes, integers(ctypes.c_int32, [375, 500, 384, 512]), pointers([out]), True, False
    )
    expected = ops.accumulate_cams(maps, (375, 500), padded=(384, 512))
    torch.testing.assert_close(out, expected, **tolerance(torch.float32))
