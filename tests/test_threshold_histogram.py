import math

import numpy as np
import pytest
import torch

from ribfast import ops, reference
from ribfast.cams import enlarge_cams

RNG = np.random.default_rng(11)
EVEN = np.arange(0, 0.605, 0.01)
SETS = {
    "even": EVEN,
    "one": [0.3],
    "equal": [0.2, 0.2, 0.2],
    "uneven": [-1.0, 0.0, 1e-30, 1e-20, 0.1, np.nextafter(np.float32(0.1), 1), 0.5, 1.0, 3e38],
    "crowded": np.concatenate([np.linspace(0.5, 0.5 + 1e-5, 60), [0.0, 1.0]]),
    "many": np.linspace(0, 1, 1000),
}


def drawn(n, size, thresholds, n_labels, dtype=torch.float32):
    """Maps with values at thresholds, next to them and equal to one another; labels with 255 among them."""
    values = RNG.random((n, *size), dtype=np.float32)
    edges = np.asarray(thresholds, np.float32)
    for change in (edges, np.nextafter(edges, np.float32(9)), np.nextafter(edges, np.float32(-9)), values.ravel()[:3]):
        if change.size:
            chosen = RNG.random(values.shape) < 0.15
            values[chosen] = RNG.choice(change, chosen.sum())
    mask = RNG.integers(0, n_labels, size).astype(np.uint8)
    mask[RNG.random(size) < 0.1] = 255
    return torch.from_numpy(values).to(dtype), torch.from_numpy(mask)


def direct(maps, mask, threshold, n_labels):
    """The confusion at one threshold: (n_labels, 1 + n), background first."""
    maps = maps.float().numpy()
    stacked = np.concatenate([np.full((1, *mask.shape), np.float32(threshold)), maps])
    labels, counted = stacked.argmax(0), mask.numpy() != 255
    pairs = mask.numpy()[counted].astype(int) * len(stacked) + labels[counted]
    return np.bincount(pairs, minlength=n_labels * len(stacked)).reshape(n_labels, -1)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("size", [(1, 1), (3, 129), (37, 50), (63, 17)], ids=str)
def test_equals_argmax_at_every_threshold(name, size):
    thresholds = np.sort(np.asarray(SETS[name], np.float32))
    for n, dtype in ((1, torch.float32), (3, torch.float16), (2, torch.bfloat16), (4, torch.float32)):
        maps, mask = drawn(n, size, thresholds, 6, dtype)
        found = ops.threshold_histogram(maps, mask, thresholds, 6)
        assert found.shape == (6, n, len(thresholds) + 1) and found.dtype == torch.int64
        assert torch.equal(found, reference.threshold_histogram(maps, mask, torch.from_numpy(thresholds), 6))
        for index in {0, len(thresholds) // 2, len(thresholds) - 1, *RNG.integers(0, len(thresholds), 5).tolist()}:
            above = found[:, :, index + 1 :].sum(2).numpy()
            background = found.sum((1, 2)).numpy() - above.sum(1)
            assert np.array_equal(np.column_stack([background, above]), direct(maps, mask, thresholds[index], 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (37, 50), (64, 128), (61, 501), (375, 500)], ids=str)
def test_strided_maps_are_enlarged_to_the_same_bits(size, dtype):
    quarter = tuple(-(-side // 4) for side in size)
    maps, _ = drawn(3, quarter, EVEN, 21, dtype)
    mask = drawn(1, size, EVEN, 21)[1]
    expected = ops.threshold_histogram(enlarge_cams(maps, size), mask, EVEN, 21)
    assert torch.equal(ops.threshold_histogram(maps, mask, EVEN, 21, stride=4), expected)
    thirds = torch.rand(2, -(-size[0] // 3), -(-size[1] // 3)).to(dtype)
    padded = 3 * thirds.shape[1], 3 * thirds.shape[2]
    large = ops.accumulate_cams([thirds[None]], size, padded=padded, relu=False)
    expected = ops.threshold_histogram(large, mask, EVEN, 21)
    assert torch.equal(ops.threshold_histogram(thirds, mask, EVEN, 21, stride=3), expected)


def test_special_values():
    inf = math.inf
    maps = torch.tensor([[[inf, -inf, 0.0, -0.0, 0.5, 1e-42, -inf]]])
    mask = torch.zeros(1, 7, dtype=torch.uint8)
    found = ops.threshold_histogram(maps, mask, [0.0, 0.5], 2)
    assert found[0, 0].tolist() == [4, 2, 1] and found[1].sum() == 0  # of -inf, -inf, 0, -0; 0.5, 1e-42; inf
    both = torch.full((2, 3, 4), 0.25)
    found = ops.threshold_histogram(both, torch.full((3, 4), 255, dtype=torch.uint8), [0.1], 3)
    assert found.sum() == 0
    found = ops.threshold_histogram(both, torch.ones(3, 4, dtype=torch.uint8), [0.1], 3)
    assert found[1, 0, 1] == found.sum() == 12  # the first of equals
    assert ops.threshold_histogram(both.double() + 1e-12, torch.ones(3, 4, dtype=torch.uint8), [0.25], 3)[1, 0, 0] == 12
    assert ops.threshold_histogram(both[:0], torch.ones(3, 4, dtype=torch.uint8), [0.1], 3).shape == (3, 0, 2)
    empty = ops.threshold_histogram(both[:, :0], torch.ones(0, 4, dtype=torch.uint8), [0.1], 3)
    assert empty.shape == (3, 2, 2) and empty.sum() == 0


def test_threads_count_the_same():
    """Of an image that is large enough to be shared out."""
    maps, mask = drawn(1, (1100, 1500), EVEN, 4, torch.float16)
    strided, before = maps[:, :275, :375], torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append([ops.threshold_histogram(maps, mask, EVEN, 4),
                          ops.threshold_histogram(strided, mask, EVEN, 4, stride=4)])  # fmt: skip
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))
    assert found[0][0].sum() == (mask != 255).sum()


def test_any_strides():
    maps, mask = drawn(3, (20, 30), EVEN, 5)
    expected = ops.threshold_histogram(maps, mask, EVEN, 5)
    turned, turned_mask = maps.transpose(1, 2).contiguous().transpose(1, 2), mask.t().contiguous().t()
    thresholds = torch.from_numpy(np.repeat(EVEN, 2).astype(np.float32))[::2]
    assert torch.equal(ops.threshold_histogram(turned, turned_mask, thresholds, 5), expected)


def test_opcheck_and_compiles():
    maps, mask = drawn(2, (9, 13), EVEN, 5)
    thresholds = torch.from_numpy(EVEN).float()
    torch.library.opcheck(torch.ops.ribfast.threshold_histogram.default, (maps, mask, thresholds, 5, 1))
    compiled = torch.compile(lambda m: ops.threshold_histogram(m * 2, mask, thresholds, 5), backend="aot_eager")
    assert torch.equal(compiled(maps), ops.threshold_histogram(maps * 2, mask, thresholds, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            ops.threshold_histogram(maps, mask, EVEN, 5), reference.threshold_histogram(maps, mask, thresholds, 5)
        )
    with pytest.raises(RuntimeError, match="expected tensors that need no gradient"):
        ops.threshold_histogram(maps.requires_grad_(), mask, EVEN, 5)


def test_refuses_bad_input():
    maps, mask = torch.zeros(2, 8, 9), torch.zeros(8, 9, dtype=torch.uint8)
    nan = maps.clone()
    nan[1, 7, 8] = math.nan
    first = maps.clone()
    first[0, 0, 0] = math.nan
    for error, match, arguments, options in [
        (TypeError, "maps to be a tensor", ([1.0], mask, [0.1], 3), {}),
        (TypeError, "maps in float64, float32, float16 or bfloat16", (maps.int(), mask, [0.1], 3), {}),
        (TypeError, r"mask to be a uint8 tensor \(H, W\), got torch.int64", (maps, mask.long(), [0.1], 3), {}),
        (ValueError, r"mask \(H, W\), got shape \(1, 8, 9\)", (maps, mask[None], [0.1], 3), {}),
        (ValueError, r"shape \(2, 8, 9\), the mask's \(8, 9\) over the stride of 1", (maps[:, 1:], mask, [0.1], 3), {}),
        (ValueError, r"expected maps of shape \(2, 2, 3\)", (maps, mask, [0.1], 3), {"stride": 4}),
        (ValueError, "list of thresholds", (maps, mask, [], 3), {}),
        (ValueError, "finite thresholds that ascend", (maps, mask, [0.2, 0.1], 3), {}),
        (ValueError, "finite thresholds that ascend", (maps, mask, [0.2, math.nan], 3), {}),
        (ValueError, "n_labels from 1 to 255, got 0", (maps, mask, [0.1], 0), {}),
        (TypeError, "n_labels to be an integer", (maps, mask, [0.1], 2.0), {}),
        (ValueError, "stride from 1 to 64, got 65", (maps, mask, [0.1], 3), {"stride": 65}),
        (ValueError, "maps without NaN", (nan, mask, [0.1], 3), {}),
        (ValueError, "maps without NaN", (first, mask + 255, [0.1], 3), {}),
        (ValueError, "labels in the mask below 3 or 255", (maps, mask + 3, [0.1], 3), {}),
        (ValueError, "labels in the mask below 3 or 255", (maps, mask + 254, [0.1], 3), {}),
    ]:
        with pytest.raises(error, match=match):
            ops.threshold_histogram(*arguments, **options)
    with pytest.raises(ValueError, match="fewer than 2\\^24 counts"):
        torch.ops.ribfast.threshold_histogram(torch.zeros(200, 8, 9), mask, torch.linspace(0, 1, 5000), 255, 1)
