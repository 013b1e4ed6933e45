import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ribfast import data, models
from ribfast.cams import CROP_SCALES, crop_origins, merge_crops, multi_crop_cams


def merged_plainly(maps, rows, columns, crop, plane, size):
    """Crop by crop, in arrays of the scale's size."""
    total, cover = torch.zeros(maps.shape[1], *plane, dtype=maps.dtype), torch.zeros(plane, dtype=maps.dtype)
    for own, (y, x) in zip(maps.relu(), [(y, x) for y in rows for x in columns], strict=True):
        h, w = min(crop, plane[0] - y), min(crop, plane[1] - x)
        large = F.interpolate(own[None], (crop, crop), mode="bilinear")[0]
        total[:, y : y + h, x : x + w] += large[:, :h, :w]
        cover[y : y + h, x : x + w] += 1
    return F.interpolate((total / cover)[None], size, mode="bilinear")[0]


@pytest.mark.parametrize("length, crop, stride, expected", [
    (1, 8, 5, [0]), (8, 8, 5, [0]), (9, 8, 5, [0, 1]), (13, 8, 5, [0, 5]), (14, 8, 5, [0, 5, 6]),
    (28, 8, 5, [0, 5, 10, 15, 20]),
    (1500, 448, 300, [0, 300, 600, 900, 1052]),
])  # fmt: skip
def test_origins(length, crop, stride, expected):
    assert crop_origins(length, crop, stride) == expected


@pytest.mark.parametrize("plane, size", [
    ((20, 31), (20, 31)), ((47, 70), (20, 31)), ((13, 9), (40, 27)), ((16, 16), (16, 16)), ((1, 1), (3, 2)),
    ((64, 17), (1, 5)),
])  # fmt: skip
@pytest.mark.parametrize("stride", [4, 11, 16])
def test_merging_equals_plain_torch(device, plane, size, stride):
    crop, cells = 16, (2, 3)
    rows, columns = (crop_origins(side, crop, stride) for side in plane)
    maps = torch.randn(len(rows) * len(columns), 5, *cells, dtype=torch.float64)
    expected = merged_plainly(maps, rows, columns, crop, plane, size)
    before = torch.rand(5, *size, dtype=torch.float64)
    out = before.clone().to(device)
    result = merge_crops(maps.to(device), rows, columns, crop, plane, out)
    assert result is out
    torch.testing.assert_close(result.cpu(), before + expected, rtol=1e-10, atol=1e-12)
    single = merge_crops(maps.float().to(device), rows, columns, crop, plane, torch.zeros(5, *size, device=device))
    torch.testing.assert_close(single.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def naive(model, image, classes, scales, crop, stride):
    total = 0
    for scale in scales:
        view = data.make_views(image, [scale], data.NORMALIZATIONS[model.normalization])[0][:1]
        plane = view.shape[2:]
        padded = F.pad(view, (0, max(0, crop - plane[1]), 0, max(0, crop - plane[0])))
        rows, columns = (crop_origins(side, crop, stride) for side in plane)
        maps = [model(padded[..., y : y + crop, x : x + crop])[:, classes] for y in rows for x in columns]
        total = total + merged_plainly(torch.cat(maps), rows, columns, crop, plane, image.shape[:2])
    low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
    return (total - low) / (high - low)


def photograph(height, width):
    coarse = np.random.default_rng(0).random((1, 3, 5, 6), dtype=np.float32) * 255
    return F.interpolate(torch.from_numpy(coarse), (height, width), mode="bilinear")[0].permute(1, 2, 0).byte().numpy()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return models.cam_classifier("resnet18", 4)


@pytest.mark.parametrize("size", [(40, 75), (64, 64), (20, 30)], ids=str)
def test_equals_plain_torch(model, device, size):
    """The smallest scales are padded, the largest overlap."""
    image, how = photograph(*size), dict(crop=64, stride=40, scales=(0.5, 1.0, 1.7))
    with torch.no_grad():
        expected = naive(model.to("cpu"), image, [2, 0], **how)
    for batch in (1, 3, 16):
        result = multi_crop_cams(model.to(device), image, [2, 0], batch=batch, **how)
        torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=2e-4)
    assert result.shape == (2, *size) and result.min() == 0 and result.max() == 1
    assert not result.requires_grad and not result.is_inference()


class Constant(nn.Module):
    """Counts what it sees; its maps are the mean of the input's channels, at stride 16."""

    n_classes, normalization = 3, "symmetric"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, images):
        self.seen.append(tuple(images.shape))
        return F.avg_pool2d(images.mean(1, keepdim=True), 16).expand(-1, 3, -1, -1) * self.weight


def test_batches_go_across_scales():
    model = Constant()
    multi_crop_cams(model, photograph(375, 500), [1], batch=7)
    crops = sum(
        len(crop_origins(round(375 * s), 448, 300)) * len(crop_origins(round(500 * s), 448, 300)) for s in CROP_SCALES
    )
    assert [n for n, *_ in model.seen] == [7] * (crops // 7) + [crops % 7] * (crops % 7 > 0)
    assert all(shape == (3, 448, 448) for _, *shape in model.seen for shape in [tuple(shape)])


def test_constant_maps_are_zero_and_no_classes_cost_nothing():
    model, white = Constant(), np.full((37, 40, 3), 241, np.uint8)
    assert not multi_crop_cams(model, white, [0, 2], crop=32, stride=20, scales=(1.0, 2.0)).any()
    model.seen.clear()
    assert multi_crop_cams(model, white, []).shape == (0, 37, 40) and not model.seen


def test_autocast_reaches_the_network_alone(model):
    """16-bit maps are merged in float32."""
    image, how = photograph(40, 75), dict(crop=64, stride=40, scales=(1.0, 1.7))
    expected = multi_crop_cams(model.to("cpu"), image, [1], **how)
    with torch.autocast("cpu", torch.bfloat16):
        result = multi_crop_cams(model, image, [1], **how)
        maps = torch.rand(4, 2, 4, 4)
        merged = merge_crops(maps, [0, 8], [0, 8], 16, (24, 24), torch.zeros(2, 24, 24))
    plain = merged_plainly(maps, [0, 8], [0, 8], 16, (24, 24), (24, 24))
    torch.testing.assert_close(merged, plain, rtol=0, atol=1e-5)
    assert result.dtype == torch.float32 and 0 < (result - expected).abs().max() < 0.1


def test_refuses_bad_input():
    image = photograph(20, 30)
    for match, options in (
        ("0 < stride <= crop, got stride 449 and crop 448", dict(stride=449)),
        ("0 < stride <= crop, got stride 0", dict(stride=0)),
        ("a batch of at least 1, got 0", dict(batch=0)),
        ("at least one scale", dict(scales=())),
        ("a scale above 0, got -1", dict(scales=(-1,))),
        ("classes from 0 to 2, got", dict(classes=[3])),
        (r"a uint8 array \(H, W, 3\)", dict(image=image.astype(np.float32))),
    ):
        with pytest.raises(ValueError, match="expected " + match):
            multi_crop_cams(Constant(), **{"image": image, "classes": [0]} | options)
