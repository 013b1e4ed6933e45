"""erase: kernels against the specification."""

import functools
import itertools
import math

import pytest
import torch
from cases import DTYPES, NAMES, rounding

from ribfast import ops, reference

SIZES = [  # of maps and images
    ((1, 1), (1, 1)), ((1, 1), (5, 3)), ((3, 4), (1, 1)), ((2, 2), (2, 2)), ((4, 4), (63, 64)), ((5, 9), (129, 151)),
    ((28, 27), (151, 33)), ((9, 11), (4, 25)), ((13, 3), (5, 2)), ((1, 7), (2, 63)),
]  # fmt: skip


def inputs(small, large, device="cpu", dtype=torch.float32, maps_dtype=None, channels=3, channels_last=False):
    """Three images: of one two maps, of one none."""
    images = torch.randn(3, channels, *large, dtype=torch.float64).to(device, dtype)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    maps = torch.randn(3, *small, dtype=torch.float64).mul_(3).add_(1).to(device, maps_dtype or dtype)
    return images, maps, torch.tensor([2, 0, 2], device=device)


def with_gradient(run, images, maps, which, grads=None, **options):
    leaf = maps.clone().requires_grad_()
    erased, areas = run(images, leaf, which, **options)
    if grads is None:
        torch.manual_seed(3)
        grads = torch.randn(erased.shape).bfloat16(), torch.randn(areas.shape).bfloat16()  # of which no type loses any
    torch.autograd.backward([erased, areas], [g.to(t) for g, t in zip(grads, (erased, areas), strict=True)])
    return erased.detach(), areas.detach(), leaf.grad


def agrees(images, maps, which, **options):
    erased, areas, grad = with_gradient(ops.erase, images, maps, which, **options)
    exact = with_gradient(reference.erase, images.double(), maps.double(), which, **options)
    assert erased.dtype == images.dtype and grad.dtype == maps.dtype and grad.shape == maps.shape
    assert areas.dtype == reference.accumulator_dtype(maps.dtype)
    interleaved = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    assert erased.is_contiguous(memory_format=torch.channels_last if interleaved else torch.contiguous_format)
    # attention is off by a few roundings, more where a map varies little: a mask by a quarter of sharpness times that
    precision = 2**-50 if areas.dtype == torch.float64 else 2**-21
    spread = [m.max() / (m.max() - m.min()) for m in maps.double().relu() if m.max() > m.min()]
    off = precision * max([1.0, *spread]) * (1 + abs(options.get("sharpness", 100.0)) / 4)
    close = rounding(images.dtype)
    largest = images.double().abs().max().item()
    torch.testing.assert_close(erased.double(), exact[0], rtol=close["rtol"], atol=(close["atol"] + off) * largest)
    pixels = images.shape[2] * images.shape[3]
    torch.testing.assert_close(areas.double(), exact[1], rtol=1e-5, atol=pixels * precision * max([1.0, *spread]))
    close = rounding(maps.dtype)
    largest = max(exact[2].abs().max().item(), 1e-6)
    atol = close["atol"] * largest + 8 * off * largest
    torch.testing.assert_close(grad.double(), exact[2], rtol=close["rtol"], atol=atol)
    return erased, areas, grad


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=NAMES.get)
@pytest.mark.parametrize("small, large", SIZES, ids=str)
def test_equals_the_specification(device, small, large, dtype, channels_last):
    images, maps, which = inputs(small, large, device, dtype, channels_last=channels_last)
    for sharpness, level in ((100.0, 0.5), (7.0, 0.2)):
        agrees(images, maps, which, sharpness=sharpness, level=level)


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_any_number_of_channels(device, channels, channels_last):
    agrees(*inputs((6, 5), (43, 67), device, channels=channels, channels_last=channels_last))


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("maps_dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_every_pair_of_types(device, dtype, maps_dtype, channels_last):
    agrees(*inputs((6, 5), (43, 67), device, dtype, maps_dtype, channels_last=channels_last), sharpness=10.0)


def test_by_hand(device):
    """A map (1, 2) over four pixels in a row: 0, 1, 3 and 4 with weights 0, 1/4, 3/4, 1 of the right cell."""
    maps = torch.tensor([[[-3.0, 4.0]]], device=device)
    images = torch.tensor([5.0, 6.0, 7.0, 8.0], device=device).view(1, 1, 1, 4)
    erased, areas = ops.erase(images, maps, torch.zeros(1, dtype=torch.int64, device=device), sharpness=8.0)
    kept = [1 / (1 + math.exp(8 * (a - 0.5))) for a in (0, 0.25, 0.75, 1)]
    expected = [x * k for x, k in zip((5, 6, 7, 8), kept, strict=True)]
    assert erased.flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert areas.tolist() == pytest.approx([2.0])


@pytest.mark.parametrize("sharpness, level", [(0.0, 0.5), (-20.0, 0.5), (20.0, -1.0), (20.0, 3.0), (1e30, 0.3)])
def test_any_sharpness_and_level(device, sharpness, level):
    images, maps, which = inputs((4, 5), (33, 41), device)
    if abs(sharpness) < 1e3:
        agrees(images, maps, which, sharpness=sharpness, level=level)
        return
    attention = ops.erase(torch.ones_like(images), maps, which, sharpness=-1.0, level=0.0)[0]  # its logistic function
    sure = (attention - 1 / (1 + math.exp(-level))).abs() > 1e-5
    erased = ops.erase(images, maps, which, sharpness=sharpness, level=level)[0]
    expected = torch.where(attention < 1 / (1 + math.exp(-level)), images[which], 0.0)
    assert torch.equal(erased[sure], expected[sure])


def test_maps_that_attend_to_nothing(device):
    """Negative, constant, or varying by rounding: images stay as they are, and nothing has a gradient."""
    images, _, _ = inputs((4, 5), (33, 41), device)
    maps = torch.stack([-torch.rand(4, 5) - 1, torch.full((4, 5), 3.0), 3 + torch.rand(4, 5) * 1e-5, torch.zeros(4, 5)])
    which = torch.tensor([0, 1, 1, 2], device=device)
    erased, areas, grad = with_gradient(ops.erase, images, maps.to(device), which)
    assert torch.equal(erased, images[which])
    assert areas.count_nonzero() == 0 and grad.count_nonzero() == 0
    agrees(images, maps.to(device), which, level=-0.01)


def test_a_rectified_cell_has_no_gradient(device):
    images, maps, which = inputs((4, 5), (33, 41), device)
    maps[0, 1] = 0
    *_, grad = agrees(images, maps, which)
    assert grad[maps <= 0].count_nonzero() == 0 and grad[maps > 0].count_nonzero() > 0


def test_nan_stays_in_its_map(device):
    images, maps, which = inputs((4, 5), (33, 41), device)
    maps[1, 2, 3] = math.nan
    erased, areas, grad = with_gradient(ops.erase, images, maps, which)
    assert erased[1].isnan().all() and areas[1].isnan() and grad[1][~(maps[1] <= 0)].isnan().all()
    rest = with_gradient(ops.erase, images, maps.nan_to_num(nan=1.0), which)
    for a, b in zip((erased, areas, grad), rest, strict=True):
        assert torch.equal(a[::2], b[::2])


def test_cells_that_no_pixel_reads(device):
    """Reduced, a map may hold what is nowhere seen."""
    images, maps, which = inputs((9, 9), (3, 3), device)
    expected = with_gradient(ops.erase, images, maps, which)
    for odd in (math.nan, math.inf, 1e30):
        changed = maps.clone()
        changed[:, 0, 0] = odd  # pixels read the cells 1, 4 and 7
        found = with_gradient(ops.erase, images, changed, which)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
def test_no_maps(device, channels_last):
    for count in (2, 0):
        images = torch.randn(count, 3, 9, 7, device=device)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        maps = torch.zeros(0, 4, 5, device=device, requires_grad=True)
        erased, areas = ops.erase(images, maps, torch.zeros(0, dtype=torch.int64, device=device))
        assert erased.shape == (0, 3, 9, 7) and areas.shape == (0,)
        (erased.sum() + areas.sum()).backward()
        assert maps.grad.shape == maps.shape


def test_any_strides(device):
    images, maps, which = inputs((6, 5), (23, 31), device)
    expected = with_gradient(ops.erase, images, maps, which)
    grads = [torch.randn(expected[0].shape, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    expected = with_gradient(ops.erase, images, maps, which, grads)
    turned = images.transpose(2, 3).contiguous().transpose(2, 3)
    steps = torch.stack([which, which], -1)[:, 0]
    for laid_out in (maps.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([maps, maps], -1)[..., 0]):
        leaf = laid_out.detach().requires_grad_()
        erased, areas = ops.erase(turned, leaf, steps)
        torch.autograd.backward([erased, areas], [g.to(expected[0]) for g in grads])
        for a, b in zip((erased, areas, leaf.grad), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
def test_gradients_of_any_strides(device, channels_last):
    images, maps, which = inputs((6, 5), (23, 31), device, torch.float64, channels_last=channels_last)
    grad = torch.randn(3, 3, 23, 31, dtype=torch.float64, device=device)
    raw = functools.partial(torch.ops.ribfast.erase_backward, images=images, maps=maps, which=which, sharpness=9.0,
                            level=0.4)  # fmt: skip
    expected = raw(grad, None)
    for laid_out in (grad.contiguous(memory_format=torch.channels_last), grad.transpose(2, 3).contiguous().mT):
        torch.testing.assert_close(raw(laid_out, None), expected)
    torch.testing.assert_close(raw(grad[:, :1, :1, :1].expand_as(grad), None),
                               raw(grad[:, :1, :1, :1].expand_as(grad).contiguous(), None))  # fmt: skip


def test_one_result_alone_has_a_gradient(device):
    images, maps, which = inputs((6, 5), (23, 31), device)
    for pick in (0, 1):
        found, expected = maps.clone().requires_grad_(), maps.double().requires_grad_()
        ops.erase(images, found, which, sharpness=9.0)[pick].square().sum().backward()
        reference.erase(images.double(), expected, which, sharpness=9.0)[pick].square().sum().backward()
        largest = expected.grad.abs().max().item()
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-4, atol=1e-5 * largest)
    none = torch.ops.ribfast.erase_backward(None, None, images, maps, which, 9.0, 0.5)
    assert none.shape == maps.shape and none.count_nonzero() == 0


def test_autocast(device):
    images, maps, which = inputs((6, 5), (23, 31), device, torch.float32, torch.bfloat16)
    expected = with_gradient(ops.erase, images, maps, which)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = with_gradient(ops.erase, images, maps, which)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_results_do_not_depend_on_threads():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            found.append(with_gradient(ops.erase, *inputs((28, 28), (129, 151), channels_last=True)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
def test_opcheck(device, channels_last):
    images, maps, which = inputs((3, 4), (13, 17), device, channels_last=channels_last)
    torch.library.opcheck(torch.ops.ribfast.erase.default, (images, maps.clone().requires_grad_(), which, 100.0, 0.5))
    backward = torch.ops.ribfast.erase_backward.default
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    for grad, grad_areas in itertools.product((None, images[which]), (None, maps[:, 0, 0])):
        torch.library.opcheck(backward, (grad, grad_areas, images, maps, which, 100.0, 0.5), test_utils=tests)


def test_gradcheck(device):
    """The kernels' own gradient in float64, away from the kinks of the rectification."""
    images, maps, which = inputs((3, 4), (9, 11), device, torch.float64)
    maps = torch.where(maps.abs() < 0.1, 0.5, maps).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: ops.erase(images, m, which, sharpness=5.0), (maps,))


def test_compiles(device):
    images, maps, which = inputs((3, 4), (13, 17), device)
    compiled = torch.compile(ops.erase, fullgraph=True, backend="aot_eager")
    for a, b in zip(with_gradient(compiled, images, maps, which), with_gradient(ops.erase, images, maps, which),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def refused(error, match, *args, **options):
    with pytest.raises(error, match=match):
        ops.erase(*args, **options)


def test_refuses_bad_input(device):
    images, maps, which = inputs((3, 4), (13, 17), device)
    refused(TypeError, "images to be a tensor .* got int", 3, maps, which)
    refused(TypeError, "images in float64, float32, float16 or bfloat16, got torch.uint8", images.byte(), maps, which)
    refused(ValueError, r"images \(N, C, H, W\), got shape \(3, 13, 17\)", images[0], maps, which)
    refused(ValueError, "images with at least one channel", images[:, :0], maps, which)
    refused(ValueError, "images with at least one row and column", images[:, :, :0], maps, which)
    refused(TypeError, "maps to be a tensor .* got list", images, [maps], which)
    refused(ValueError, r"maps \(P, h, w\), got shape \(3, 4\)", images, maps[0], which)
    refused(ValueError, "maps with at least one row and column", images, maps[:, :, :0], which)
    refused(ValueError, "maps below 2\\^24 a side", images, maps[:, :1, :1].expand(3, 2**24, 1), which)
    refused(TypeError, r"which to be an int64 tensor \(P,\), got torch.int32", images, maps, which.int())
    refused(TypeError, r"which to be an int64 tensor \(P,\), got list", images, maps, [0, 1, 2])
    refused(ValueError, r"which \(3,\), the image of each map, got shape \(2,\)", images, maps, which[:2])
    refused(TypeError, "sharpness to be a number, got str", images, maps, which, sharpness="high")
    refused(ValueError, "sharpness to be a finite number, got inf", images, maps, which, sharpness=math.inf)
    refused(ValueError, "level to be a finite number, got nan", images, maps, which, level=math.nan)
    refused(RuntimeError, "images that need no gradient, got requires_grad=True; detach", images.requires_grad_(),
            maps, which)  # fmt: skip


def test_other_devices_are_refused():
    images, maps, which = inputs((3, 4), (13, 17))
    refused(ValueError, "all tensors on one device, got cpu and meta", images, maps.to("meta"), which)


@pytest.mark.parametrize("wrong", [-1, 3, 2**62])
def test_names_a_wrong_image(wrong):
    images, maps, which = inputs((3, 4), (13, 17))
    which[1] = wrong
    refused(ValueError, f"which from 0 to 2, got {wrong}", images, maps, which)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_wrong_image_is_empty_on_cuda():
    images, maps, which = inputs((3, 4), (13, 17), "cuda")
    expected = with_gradient(ops.erase, images, maps, which)
    for wrong in (-1, 3, 2**62):
        which[1] = wrong
        for a, b in zip(with_gradient(ops.erase, images, maps, which), expected, strict=True):
            assert torch.equal(a[::2], b[::2]) and a[1].count_nonzero() == 0


def test_refuses_what_memory_would_not_survive(device):
    images, maps, which = inputs((3, 4), (13, 17), device)
    grad, grad_areas, rest = images[which], maps[:, 0, 0], (100.0, 0.5)
    erase, backward = torch.ops.ribfast.erase, torch.ops.ribfast.erase_backward
    for args in (
        (images[0], maps, which, *rest), (images[:, :0], maps, which, *rest), (images, maps[0], which, *rest),
        (images, maps, which[:2], *rest), (images, maps, which.int(), *rest), (images, maps, which, 1e300, 0.5),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match="erase: expected"):
            erase(*args)
    for args in ((grad[:2], None), (grad[:, :2], None), (grad[..., 1:], None), (grad.int(), None),
                 (None, grad_areas[:2]), (None, grad_areas[:, None]), (grad, grad_areas.int())):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match="erase_backward: expected"):
            backward(*args, images, maps, which, *rest)
    with pytest.raises(RuntimeError, match="erase: expected images that need no gradient"):
        erase(images.clone().requires_grad_(), maps, which, *rest)
    with pytest.raises(RuntimeError, match="erase_backward: expected tensors that need no gradient"):
        backward(grad, None, images, maps.clone().requires_grad_(), which, *rest)


def test_second_derivatives_are_refused(device):
    images, maps, which = inputs((3, 4), (13, 17), device)
    leaf = maps.requires_grad_()
    erased, _ = ops.erase(images, leaf, which)
    with pytest.raises(RuntimeError, match="second derivatives of erasing are not there"):
        torch.autograd.grad(erased.sum(), leaf, create_graph=True)
