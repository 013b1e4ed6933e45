import math
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import DTYPES, NAMES, tolerance

from ribfast import _ext, ops, reference

METHODS = ["par", "pamr"]
# sizes that break blocks and stretches of them, single pixels and lines, and images smaller than the dilations
SHAPES = [(2, 3, 33, 70), (1, 1, 1, 1), (1, 2, 1, 129), (1, 4, 50, 2), (2, 21, 9, 17), (1, 9, 26, 64)]


def drawn(shape, dtype=torch.float32, device="cpu", top=255):
    """An image with edges, and maps, (N, C, H, W)."""
    n, _, height, width = shape
    coarse = torch.rand(n, 3, -(-height // 5), -(-width // 5), dtype=torch.float64)
    blocks = coarse.repeat_interleave(5, 2).repeat_interleave(5, 3)[..., :height, :width]
    image = (0.8 * blocks + 0.2 * torch.rand(n, 3, height, width, dtype=torch.float64)) * top
    return image.to(device, dtype), torch.rand(shape, dtype=torch.float64).to(device, dtype)


def exactly(image, maps, **options):
    """The reference in float64."""
    return reference.refine(image, maps.double(), **options)


def close(result, image, maps, **options):
    assert result.dtype == torch.float32 and result.shape == maps.shape and result.is_contiguous()
    torch.testing.assert_close(result.double(), exactly(image, maps, **options), **tolerance(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_equals_reference(device, dtype, shape, method):
    image, maps = drawn(shape, dtype, device)
    close(ops.refine(image, maps, method=method), image, maps, method=method)


@pytest.mark.parametrize("classes", range(1, 19))
def test_any_number_of_classes(device, classes):
    image, maps = drawn((1, classes, 6, 150), device=device)
    close(ops.refine(image, maps, iterations=2), image, maps, iterations=2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dilations", [(1,), (7,), (5, 1, 40), (2, 2), (2**24 - 1, 3), tuple(range(1, 17))], ids=str)
def test_dilations(device, method, dilations):
    image, maps = drawn((1, 3, 20, 37), device=device)
    options = dict(method=method, dilations=dilations, iterations=3)
    close(ops.refine(image, maps, **options), image, maps, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("iterations", [0, 1, 2, 21])
def test_iterations(device, method, iterations):
    image, maps = drawn((2, 3, 12, 30), device=device)
    options = dict(method=method, iterations=iterations)
    result = ops.refine(image, maps, **options)
    close(result, image, maps, **options)
    assert result.data_ptr() != maps.data_ptr()


@pytest.mark.parametrize("w1, w2", [(0.1, 0.0), (1, 0.5), (30.0, -0.01)])
def test_weights_of_par(device, w1, w2):
    image, maps = drawn((1, 2, 12, 30), device=device)
    close(ops.refine(image, maps, w1=w1, w2=w2), image, maps, w1=w1, w2=w2)


@pytest.mark.parametrize("method", METHODS)
def test_equals_what_was_released(device, method):
    """10 iterations of ToCo's PAR and of Araslanov and Roth's PAMR, on a photograph of 28x40."""
    golden = np.load(Path(__file__).parent / "golden" / "refine.npz")
    image, maps, expected = (torch.from_numpy(golden[name]).to(device)[None] for name in ("image", "maps", method))
    assert image.dtype == torch.uint8
    torch.testing.assert_close(ops.refine(image, maps, method=method), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reference.refine(image, maps, method=method), expected, rtol=1e-5, atol=1e-5)


def test_by_hand(device):
    """One colour: PAMR takes the mean of the neighbours; a border pixel is its own neighbour, the centre is not."""
    image = torch.full((1, 3, 3, 3), 7.0, device=device)
    maps = torch.zeros(1, 1, 3, 3, device=device)
    maps[0, 0, 0, 0] = 8
    result = ops.refine(image, maps, method="pamr", dilations=(1,), iterations=1)
    assert result[0, 0].tolist() == [[3, 2, 0], [2, 1, 0], [0, 0, 0]]
    par = ops.refine(image, maps, dilations=(1,), iterations=1, w2=0.0)
    torch.testing.assert_close(par, result)


@pytest.mark.parametrize("method, total", [("par", 1.01), ("pamr", 1.0)])
def test_weights_add_up(device, method, total):
    image, maps = drawn((1, 2, 40, 41), device=device)
    result = ops.refine(image, torch.ones_like(maps), method=method)
    torch.testing.assert_close(result, torch.full_like(maps, total**10), rtol=2e-5, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_pixels_that_stand_out_lose_no_accuracy(device, method):
    """A dot hundreds of standard deviations from its surroundings, and an offset beside which these are small."""
    image, maps = drawn((1, 2, 30, 40), device=device, top=1)
    image += 1000
    image[..., 7, 9] = 0
    image[..., 20, 30] = 1400
    close(ops.refine(image, maps, method=method, iterations=2), image, maps, method=method, iterations=2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("colour", [0, 255, 0.3])
def test_one_colour(device, method, colour):
    _, maps = drawn((1, 3, 20, 33), device=device)
    image = torch.full((1, 3, 20, 33), colour, dtype=torch.float32, device=device)
    close(ops.refine(image, maps, method=method), image, maps, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_ranges_of_images(device, method):
    """uint8, 0..1 and normalised values give the same."""
    image, maps = drawn((1, 3, 20, 33), device=device)
    image = image.to(torch.uint8)
    expected = ops.refine(image, maps, method=method)
    means, spreads = (torch.rand(1, 3, 1, 1, device=device) + 0.5 for _ in range(2))
    torch.testing.assert_close(ops.refine(image / 255, maps, method=method), expected, rtol=1e-4, atol=1e-4)
    normalised = (image / 255 - means) / spreads
    torch.testing.assert_close(ops.refine(normalised, maps, method=method), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_nan_of_a_map_goes_where_it_is_a_neighbour(device, method):
    image, maps = drawn((2, 3, 20, 33), device=device)
    options = dict(method=method, dilations=(2, 5), iterations=1)
    clean = ops.refine(image, maps, **options)
    maps[1, 1, 10, 16] = math.nan
    result = ops.refine(image, maps, **options)
    reached = torch.zeros(2, 3, 20, 33, dtype=torch.bool, device=device)
    for d in (2, 5):
        reached[1, 1, 10 - d : 11 + d : d, 16 - d : 17 + d : d] = True
    reached[1, 1, 10, 16] = False
    assert torch.equal(result.isnan(), reached)
    assert torch.equal(result[~reached], clean[~reached])


@pytest.mark.parametrize("method", METHODS)
def test_nan_of_an_image_goes_where_it_is_compared(device, method):
    image, maps = drawn((2, 3, 20, 33), device=device)
    options = dict(method=method, dilations=(3,), iterations=1)
    clean = ops.refine(image, maps, **options)
    image[0, 2, 10, 16] = math.nan
    result = ops.refine(image, maps, **options)
    reached = torch.zeros(2, 3, 20, 33, dtype=torch.bool, device=device)
    reached[0, :, 7:14:3, 13:20:3] = True
    assert torch.equal(result.isnan(), reached)
    assert torch.equal(result[~reached], clean[~reached])


def test_lists_of_any_sizes(device):
    kinds = [((1, 2, 9, 33), torch.float32), ((1, 5, 40, 3), torch.float16), ((1, 0, 4, 4), torch.float32)]
    pairs = [drawn(shape, dtype, device) for shape, dtype in kinds]
    results = ops.refine([i[0] for i, _ in pairs], [m[0] for _, m in pairs], iterations=3)
    assert isinstance(results, list) and len(results) == 3
    for result, (image, maps) in zip(results, pairs, strict=True):
        assert torch.equal(result, ops.refine(image, maps, iterations=3)[0])
    assert ops.refine([], []) == []


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (0, 0, 1, 1)], ids=str)
def test_zero_images_and_classes(device, shape):
    image = torch.zeros(shape[0], 3, *shape[2:], device=device)
    result = ops.refine(image, torch.zeros(shape, device=device))
    assert result.shape == shape and result.dtype == torch.float32


def test_any_strides(device):
    image, maps = drawn((2, 4, 12, 40), device=device)
    expected = ops.refine(image, maps)
    turned = image.to(memory_format=torch.channels_last), maps.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(ops.refine(*turned), expected)
    wide = torch.zeros(2, 4, 12, 80, device=device)
    wide[..., ::2] = maps
    assert torch.equal(ops.refine(image, wide[..., ::2]), expected)
    assert torch.equal(ops.refine(image[:1].expand(2, -1, -1, -1), maps)[:1], expected[:1])


def test_results_do_not_depend_on_threads_or_batch():
    image, maps = drawn((3, 5, 90, 77))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = ops.refine(image, maps)
        torch.set_num_threads(2)
        assert torch.equal(ops.refine(image, maps), expected)  # threads over images
        for n in range(3):
            assert torch.equal(ops.refine(image[n : n + 1], maps[n : n + 1])[0], expected[n])  # over rows
    finally:
        torch.set_num_threads(before)


def test_reference_is_differentiable():
    image, maps = drawn((1, 2, 4, 5), torch.float64)
    for method in METHODS:

        def refine(maps, method=method):
            return reference.refine(image, maps, method=method, dilations=(1, 3), iterations=2)

        assert torch.autograd.gradcheck(refine, (maps.requires_grad_(),))


def test_plain_torch_serves(monkeypatch):
    monkeypatch.setattr(_ext, "_chosen", {"cpu": _ext.Backend("reference", "asked for")})
    image, maps = drawn((2, 3, 9, 12), torch.float64)
    image = image.to(torch.uint8)
    result = ops.refine(image, maps, method="pamr")
    assert result.dtype == torch.float32
    assert torch.equal(result, reference.refine(image, maps.float(), method="pamr"))
    (single,) = ops.refine([image[1]], [maps[1]], method="pamr")
    assert torch.equal(single, reference.refine(image[1:], maps[1:].float(), method="pamr")[0])


@pytest.mark.parametrize("pamr", [False, True])
def test_opcheck(device, pamr):
    pairs = [drawn((2, 3, 8, 9), torch.bfloat16, device), drawn((1, 2, 5, 20), torch.float32, device)]
    images, maps = [i for i, _ in pairs], [m for _, m in pairs]
    torch.library.opcheck(torch.ops.ribfast.refine.default, (images, maps, pamr, [1, 3], 2, 0.3, 0.01))


def test_compiles_without_graph_breaks(device):
    compiled = torch.compile(lambda i, m: ops.refine(i, m * 2), fullgraph=True, backend="aot_eager")
    for height in (8, 10, 12):  # sizes that change become symbolic
        image, maps = drawn((2, 3, height, 9), device=device)
        torch.testing.assert_close(compiled(image, maps), ops.refine(image, maps * 2))


def test_autocast_changes_nothing(device):
    image, maps = drawn((1, 2, 20, 21), torch.bfloat16, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        result = ops.refine(image, maps)
    assert result.dtype == torch.float32
    assert torch.equal(result, ops.refine(image, maps))


def test_refuses_a_gradient(device):
    image, maps = drawn((1, 2, 5, 6), device=device)
    for wanted in (image, maps):
        wanted.requires_grad_()
        with pytest.raises(RuntimeError, match=r"refine: expected tensors that need no gradient.*detach\(\)"):
            ops.refine(image, maps)
        with torch.no_grad():
            ops.refine(image, maps)
        wanted.requires_grad_(False)


def test_refuses_bad_input():
    image, maps = torch.zeros(2, 3, 4, 5), torch.zeros(2, 6, 4, 5)
    for error, match, args, options in [
        (TypeError, "refine: expected images and maps to be two tensors or two lists, got Tensor and list",
         (image, [maps]), {}),
        (TypeError, "images to be a tensor or a list of tensors, got int", (3, [maps[0]]), {}),
        (TypeError, r"images \(unless uint8\) to be a tensor \(3, H, W\), got NoneType", ([None], [maps[0]]), {}),
        (TypeError, "float16 or bfloat16, got torch.int64", (image.long(), maps), {}),
        (TypeError, "maps in float64, float32, float16 or bfloat16, got torch.uint8", (image, maps.byte()), {}),
        (ValueError, "maps for each image, got 1 for 2", ([*image], [maps[0]]), {}),
        (ValueError, r"maps \(N, C, H, W\), got shape \(2, 4, 5\)", (image, maps[:, 0]), {}),
        (ValueError, "at least one row and column", (image[:, :, :0], maps[:, :, :0]), {}),
        (ValueError, r"of the maps' shape, \(2, 3, 4, 5\), got \(2, 3, 8, 10\); rescale one of them",
         (torch.zeros(2, 3, 8, 10), maps), {}),
        (ValueError, r"of the maps' shape, \(2, 3, 4, 5\), got \(2, 4, 4, 5\)", (maps[:, :4], maps), {}),
        (ValueError, "one device, got cpu and meta", (image, maps.to("meta")), {}),
        (ValueError, "method to be 'par' or 'pamr', got 'crf'", (image, maps), dict(method="crf")),
        (ValueError, "dilations to be 1 to 16 integers, got ()", (image, maps), dict(dilations=())),
        (ValueError, "dilations to be 1 to 16 integers", (image, maps), dict(dilations=[1] * 17)),
        (ValueError, "dilations to be 1 to 16 integers, got 3", (image, maps), dict(dilations=3)),
        (ValueError, "dilations from 1 to 16777215, got 0", (image, maps), dict(dilations=(1, 0))),
        (TypeError, "dilations to be an integer, got float", (image, maps), dict(dilations=(1.5,))),
        (ValueError, "iterations from 0 to 2147483647, got -1", (image, maps), dict(iterations=-1)),
        (TypeError, "iterations to be an integer, got str", (image, maps), dict(iterations="10")),
        (ValueError, "w1 above 0, got 0", (image, maps), dict(w1=0)),
        (ValueError, "w2 to be a finite number, got nan", (image, maps), dict(w2=math.nan)),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            ops.refine(*args, **options)


def test_dispatched_operator_checks_too(device):
    image, maps = torch.zeros(1, 3, 4, 5, device=device), torch.zeros(1, 2, 4, 5, device=device)
    good = [[image], [maps], False, [1, 2], 3, 0.3, 0.01]
    torch.ops.ribfast.refine(*good)
    for place, wrong in [
        (0, []), (0, [image[0]]), (0, [image.int()]), (0, [image[:, :2]]), (0, [image[..., :4]]), (1, [maps.int()]),
        (1, [maps[0]]), (1, [maps[:, :, :0]]), (1, [torch.cat([maps, maps])]), (3, []), (3, [0]), (3, [2**24]),
        (3, [1] * 17), (4, -1), (4, 2**40), (5, 0.0), (5, 1e-300), (5, math.nan), (6, math.inf),
    ]:  # fmt: skip
        with pytest.raises((ValueError, TypeError), match="refine: expected"):
            torch.ops.ribfast.refine(*good[:place], wrong, *good[place + 1 :])
