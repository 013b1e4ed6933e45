import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ribfast import masks, ops

GOLDEN = np.load(Path(__file__).parent / "golden" / "ppmg.npz")


def picture(height, width, seed=0, device="cpu"):
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 5, generator=draw) * 220
    image = F.interpolate(coarse, (height, width), mode="bilinear")[0].permute(1, 2, 0)
    image = image + torch.rand(height, width, 3, generator=draw) * 30
    return image.to(torch.uint8).contiguous().to(device)


def class_maps(count, height, width, seed=0, device="cpu"):
    """Smooth maps, each from 0 to 1"""
    draw = torch.Generator().manual_seed(seed)
    maps = F.interpolate(torch.rand(1, count, 3, 4, generator=draw), (height, width), mode="bicubic")[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return ((maps - low) / (high - low).clamp(min=1e-9)).clamp(0, 1).to(device)


def plain(image, cams, power=11, threshold=0.05, scale=0.3):
    """PMM's generation class by class, pixels and numbers as the formulas have them."""
    foregrounds, importances = [], []
    for v in cams.values():
        v = v.double().cpu()
        kept = v[v > threshold]
        cv = scale * kept.std(correction=0) / kept.mean() if len(kept) else 0.0
        smooth = torch.where(v < threshold, 0, v) ** (1 - cv)
        probabilities = torch.stack([(1 - smooth) ** power, smooth]).clamp(1e-5, 1)
        q = ops.dense_crf(
            [image.flip(-1)], [-probabilities.log().float().to(image.device)], gaussian=(3, 10), bilateral=(80, 13, 10)
        )[0].cpu()
        foregrounds.append(q[1] > 0.5)
        importances.append(v / (1 + v[foregrounds[-1]].sum()))
    foregrounds, importances = torch.stack(foregrounds), torch.stack(importances)
    labels = torch.zeros(image.shape[:2], dtype=torch.uint8)
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            held = [k for k in range(len(cams)) if foregrounds[k, y, x]]
            if held:
                labels[y, x] = list(cams)[max(held, key=lambda k: importances[k, y, x])] + 1
    return labels


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("case", range(3))
def test_equals_the_released_implementation(case, exact):
    image, expected = GOLDEN[f"{case}_bgr"][..., ::-1], GOLDEN[f"{case}_label"]
    cams = dict(zip(GOLDEN[f"{case}_keys"], GOLDEN[f"{case}_cams"], strict=True))
    result = masks.ppmg(image, cams, exact=exact).numpy()
    assert (result != expected).mean() <= 0.0005
    wrong_order = masks.ppmg(image[..., ::-1], cams, exact=exact).numpy()
    assert (wrong_order != expected).mean() > 2 * (result != expected).mean()


@pytest.mark.parametrize("case", range(3))
def test_coefficients_of_variation(case):
    """The released ones are rounded to float16; with n - 1 in the deviation the last of case 2 would be off by 2e-4."""
    for v, expected in zip(GOLDEN[f"{case}_cams"], GOLDEN[f"{case}_cv"], strict=True):
        v = torch.from_numpy(v).float()
        inside = (v > 0.2) & (v < 0.8)
        smooth = masks.smooth_by_variation(v)
        cv = 1 - (smooth[inside].log() / v[inside].log()).double().mean()
        assert abs(cv - expected) < 2e-4


def test_smoothing_of_a_batch(device):
    maps = torch.cat([class_maps(3, 9, 13), torch.zeros(1, 9, 13), torch.ones(1, 9, 13), torch.full((1, 9, 13), 0.04)])
    maps[0, 0, 0], maps[0, 0, 1] = 0.0499, 0.05
    result = masks.smooth_by_variation(maps.to(device)).cpu()
    for v, got in zip(maps, result, strict=True):
        kept = v[v > 0.05].double()
        cv = 0.3 * kept.std(correction=0) / kept.mean() if len(kept) else 0.0
        expected = torch.where(v < 0.05, 0, v).double() ** (1 - cv)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    assert result.dtype == torch.float32 and result[0, 0, 0] == 0 and result[0, 0, 1] > 0.05
    assert not result[3].any() and torch.equal(result[4], torch.ones(9, 13)) and not result[5].any()
    several = masks.smooth_by_variation(maps.view(2, 3, 9, 13).to(device)).cpu()
    assert torch.equal(several.flatten(0, 1), result)
    halves = masks.smooth_by_variation(maps.half().to(device)).cpu()
    assert torch.equal(halves, masks.smooth_by_variation(maps.half().float().to(device)).cpu())


def test_smoothing_stays_within_its_bounds():
    """A large scale would make the exponent negative; NaN stays in its map; gradients are finite."""
    maps = class_maps(2, 8, 8)
    steep = masks.smooth_by_variation(maps, scale=100, threshold=0)
    assert steep.min() >= 0 and steep.max() <= 1 and not steep[maps == 0].any()
    spoilt = maps.clone()
    spoilt[0, 2, 3] = math.nan
    result = masks.smooth_by_variation(spoilt)
    assert result[0, 2, 3].isnan() and torch.equal(result[1], masks.smooth_by_variation(maps)[1])
    leaf = torch.cat([maps, torch.zeros(1, 8, 8), torch.ones(1, 8, 8)]).requires_grad_()
    masks.smooth_by_variation(leaf).sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("count, size", [(1, (24, 31)), (3, (24, 31)), (2, (1, 9)), (80, (12, 13))])
def test_equals_one_crf_for_each_class(device, count, size):
    """But for pixels in which rounding decides."""
    image, maps = picture(*size, device=device), class_maps(count, *size, device=device)
    cams = {3 * k % 211: v for k, v in enumerate(maps)}
    result, expected = masks.ppmg(image, cams).cpu(), plain(image, cams)
    assert result.dtype == torch.uint8 and (result != expected).float().mean() <= 0.002
    assert count == 80 or len(result.unique()) > 1


def test_constants_matter_and_reach_the_formulas():
    image, maps = picture(24, 31), (0.6 * class_maps(2, 24, 31) + 0.4 * torch.rand(2, 24, 31)) ** 4
    cams = {0: maps[0] * 0.8, 4: maps[1]}
    usual = masks.ppmg(image, cams)
    for changed in (dict(power=3), dict(threshold=0.6), dict(cv_scale=1.5)):
        result = masks.ppmg(image, cams, **changed)
        options = {"scale" if name == "cv_scale" else name: value for name, value in changed.items()}
        assert not torch.equal(result, usual), changed
        assert (result != plain(image, cams, **options)).float().mean() <= 0.002
    for changed in (dict(gaussian=(1, 2)), dict(bilateral=(60, 60, 90)), dict(iterations=0), dict(bilateral=None)):
        assert not torch.equal(masks.ppmg(image, cams, **changed), usual), changed


def test_edges():
    image, zeros, ones = picture(6, 7), torch.zeros(6, 7), torch.ones(6, 7)
    nothing = masks.ppmg(image, {})
    assert nothing.shape == (6, 7) and nothing.dtype == torch.uint8 and not nothing.any()
    assert not masks.ppmg(image, {4: zeros}).any()
    assert (masks.ppmg(image, {4: ones}) == 5).all()
    assert (masks.ppmg(image, {2: zeros, 253: ones}) == 254).all()
    assert (masks.ppmg(image, {7: ones, 2: ones}) == 3).all()  # alike: the first class, however they are ordered
    assert masks.ppmg(image[:1, :1], {0: ones[:1, :1]}).tolist() == [[1]]


def test_a_pixel_without_a_value_belongs_to_the_class_that_holds_it():
    """The CRF fills a hole in a class map; no other class may claim it for coming first."""
    image = torch.full((15, 15, 3), 90, dtype=torch.uint8)
    hole = torch.ones(15, 15)
    hole[7, 7] = 0
    result = masks.ppmg(image, {1: torch.zeros(15, 15), 5: hole})
    assert (result == 6).all()


def test_of_two_classes_the_smaller_wins():
    image = torch.full((30, 40, 3), 90, dtype=torch.uint8)
    image[8:20, 10:25] = torch.tensor([200, 40, 10], dtype=torch.uint8)
    small = torch.zeros(30, 40)
    small[8:20, 10:25] = 0.8
    result = masks.ppmg(image, {0: torch.ones(30, 40), 1: small})
    assert (result[10:18, 12:23] == 2).all() and (result[:5] == 1).all()


def test_arrays_tensors_and_dtypes_alike(device):
    image, maps = picture(11, 12), class_maps(2, 11, 12).half()
    expected = masks.ppmg(image.to(device), {0: maps[0].float().to(device), 9: maps[1].float().to(device)})
    assert expected.device.type == device
    given = maps.numpy()
    given.flags.writeable = False
    arrays = {np.int64(9): given[1], 0: given[0].astype(np.float64)}
    assert torch.equal(masks.ppmg(image.numpy(), arrays), masks.ppmg(image, {0: maps[0], 9: maps[1]}))
    assert torch.equal(masks.ppmg(image.to(device), arrays), expected)
    backwards = {9: given[1, ::-1][::-1], 0: given[0]}
    assert torch.equal(masks.ppmg(image.numpy()[:, ::-1][:, ::-1], backwards), masks.ppmg(image, arrays))


def test_deterministic_and_leaves_its_input_alone(device):
    image, maps = picture(40, 51, device=device), class_maps(4, 40, 51, device=device)
    cams, before = dict(enumerate(maps)), maps.clone()
    first = masks.ppmg(image, cams)
    for _ in range(3):
        assert torch.equal(masks.ppmg(image, cams), first)
    assert torch.equal(maps, before)
    assert torch.equal(masks.ppmg(image, dict(reversed(cams.items()))), first)
    assert torch.equal(masks.ppmg(image, {0: maps[0].requires_grad_()}), masks.ppmg(image, {0: maps[0].detach()}))


def test_refuses_bad_input():
    image, v = picture(6, 7), torch.rand(6, 7)

    def refused(error, match, image=image, cams=None, **options):
        with pytest.raises(error, match="expected " + match):
            masks.ppmg(image, {2: v} if cams is None else cams, **options)

    refused(TypeError, "image to be a uint8 tensor or array .*, got torch.float32", image=image.float())
    refused(TypeError, "image to be a uint8 tensor or array .*, got float64", image=np.zeros((6, 7, 3)))
    refused(TypeError, "image to be a uint8 tensor or array .*, got NoneType", image=None)
    refused(ValueError, r"image \(H, W, 3\) with at least one pixel, got shape \(6, 7\)", image=image[..., 0])
    refused(ValueError, r"image \(H, W, 3\) with at least one pixel, got shape \(0, 7, 3\)", image=image[:0])
    refused(TypeError, "cams to be a dict of class -> .*, got list", cams=[v])
    refused(TypeError, "integer classes, got 'cat'", cams={"cat": v})
    refused(TypeError, "integer classes, got 1.0", cams={1.0: v})
    refused(TypeError, "integer classes, got True", cams={True: v})
    refused(ValueError, "classes from 0 to 253, got -1", cams={-1: v})
    refused(ValueError, "classes from 0 to 253, got 254", cams={254: v})
    refused(ValueError, r"the map of class 4 to have the image's size \(6, 7\), got shape \(7, 6\)", cams={4: v.T})
    refused(TypeError, "the map of class 4 to be a tensor", cams={4: None})
    refused(TypeError, "the map of class 4 in float64, float32", cams={4: v.long()})
    refused(ValueError, r"maps within \[0, 1\], got 0 to 2 in that of class 4", cams={2: v, 4: torch.eye(6, 7) * 2})
    refused(ValueError, r"maps within \[0, 1\], got -1 to 1 in that of class 4", cams={4: torch.eye(6, 7) * 2 - 1})
    refused(ValueError, r"maps within \[0, 1\], got nan to nan in that of class 4", cams={4: v * math.nan, 2: v})
    refused(ValueError, "power to be a finite number of at least 0", power=-1)
    refused(ValueError, "threshold to be a finite number of at least 0", threshold=math.nan)
    refused(TypeError, "scale to be a number", cv_scale="0.3")
    refused(ValueError, "gaussian to be 2 numbers or None", gaussian=(3,))
    refused(ValueError, "iterations of at least 0", cams={}, iterations=-1)
    with pytest.raises(ValueError, match=r"smooth_by_variation: expected maps \(..., H, W\), got shape \(7,\)"):
        masks.smooth_by_variation(v[0])
    with pytest.raises(ValueError, match="smooth_by_variation: expected maps with at least one row"):
        masks.smooth_by_variation(v[:0])
