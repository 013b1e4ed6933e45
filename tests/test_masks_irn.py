import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ribfast import data, models, ops, reference
from ribfast.masks import LabelConfig, WalkConfig, boundaries, confident_labels, feature_affinity, walk_labels


def picture(size, classes, seed=0):
    """An image, and smooth maps in [0, 1] with a hill for each class."""
    rng = np.random.default_rng(seed)
    height, width = size
    y, x = np.mgrid[:height, :width]
    image = rng.integers(90, 160, (*size, 3)).astype(np.uint8)
    maps = np.zeros((classes, *size), np.float32)
    for i in range(classes):
        cy, cx = rng.integers(4, height - 4), rng.integers(4, width - 4)
        distance = ((y - cy) ** 2 + (x - cx) ** 2) ** 0.5
        image[distance < 6] = rng.integers(0, 255, 3)
        maps[i] = np.exp(-((distance / 7) ** 2)) * (1 - 0.1 * i)
    return image, maps


def threshold(maps, constant):
    return np.concatenate([np.full((1, *maps.shape[1:]), constant, np.float32), maps]).argmax(0)


@pytest.mark.parametrize("config", [LabelConfig.irn(), LabelConfig.rib()])
def test_confident_labels(config, device):
    image, maps = picture((26, 31), 2)
    keys = np.array([4, 11])
    refined = []
    for constant in (config.foreground, config.background):
        given = torch.from_numpy(threshold(maps, constant)).to(torch.uint8)
        refined.append(ops.dense_crf_labels([torch.from_numpy(image)], [given], 3)[0].numpy())
    sure, possible = (np.array([0, 5, 12])[labels] for labels in refined)
    expected = np.where(sure > 0, sure, np.where(possible > 0, 255, 0))
    assert set(np.unique(expected)) == {0, 5, 12, 255}
    tensors = torch.from_numpy(image).to(device), torch.from_numpy(maps).to(device), torch.from_numpy(keys)
    found = confident_labels(*tensors, **config.options())
    assert found.dtype == torch.uint8 and found.device.type == device
    assert (found.cpu().numpy() == expected).mean() > 0.995  # devices round the CRF otherwise
    assert torch.equal(confident_labels(image, maps, keys, **config.options()).to(device), found)


def test_confident_labels_without_the_crf():
    """What zero iterations leave are the two thresholds."""
    maps = torch.tensor([[[0.05, 0.06, 0.3, 0.31, 0.0, 0.4]], [[0.0, 0.0, 0.0, 0.9, 0.07, 0.4]]])
    image = torch.zeros(1, 6, 3, dtype=torch.uint8)
    found = confident_labels(image, maps, [253, 0], iterations=0)
    assert found.tolist() == [[0, 255, 255, 1, 255, 254]]  # of equal maps the first one's, and `above` is not `equal`
    found = confident_labels(image, maps, [253, 0], foreground=0.05, iterations=0)
    assert found.tolist() == [[0, 254, 254, 1, 1, 254]]


def test_confident_labels_of_many():
    sizes, counts = [(20, 24), (31, 17), (20, 24), (16, 16)], [1, 3, 0, 1]
    pictures = [picture(size, count, seed) for seed, (size, count) in enumerate(zip(sizes, counts, strict=True))]
    keys = [[7], torch.tensor([2, 0, 9]), [], np.array([1])]
    images, maps = zip(*pictures, strict=True)
    together = confident_labels(images, maps, keys)
    alone = [confident_labels(*each) for each in zip(images, maps, keys, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert [set(x.unique().tolist()) - {255} for x in together] == [{0, 8}, {0, 1, 3, 10}, {0}, {0, 2}]
    assert not together[2].any() and together[2].shape == (20, 24)
    assert confident_labels([], [], []) == []


def test_confident_labels_refuse():
    image, maps = picture((12, 13), 2)
    for arguments, options, match in [
        ((image, maps, [1]), {}, r"maps of 1 keys and the image's size \(12, 13\), got shape \(2, 12, 13\)"),
        ((image, maps[..., :5], [1, 2]), {}, "the image's size"),
        ((image, maps, [1, 254]), {}, r"keys from 0 to 253, got \[1, 254\]"),
        ((image, maps, [-1, 2]), {}, "keys from 0 to 253"),
        ((image, maps, [0.5, 2.0]), {}, "keys from 0 to 253"),
        ((image, maps * np.float32("nan"), [1, 2]), {}, "finite maps"),
        ((image.astype(np.float32), maps, [1, 2]), {}, "images .* in uint8, got torch.float32"),
        (([image], [maps, maps], [[1, 2]]), {}, "maps and keys for each image, got 2 and 1 for 1"),
        ((image, maps, [1, 2]), {"background": 0.5}, "background <= foreground, got 0.5 and 0.3"),
    ]:
        with pytest.raises(ValueError, match=f"confident_labels: expected .*{match}"):
            confident_labels(*arguments, **options)
    with pytest.raises(TypeError, match="expected images to be tensors or numpy arrays, got list"):
        confident_labels([[1]], [maps], [[1, 2]])
    with pytest.raises(ValueError, match="LabelConfig: expected 0 <= background <= foreground"):
        LabelConfig(background=0.4)


def test_presets():
    assert (LabelConfig.irn().foreground, LabelConfig.irn().background) == (0.30, 0.05)
    assert (LabelConfig.rib().foreground, LabelConfig.rib().background) == (0.35, 0.17)
    walks = [(walk.background, walk.power) for walk in (WalkConfig.irn(), WalkConfig.rib(), WalkConfig.coco())]
    assert walks == [(0.25, 1.0), (0.27, 1.3), (0.22, 1.3)]

    @dataclasses.dataclass(frozen=True)
    class Command(WalkConfig):
        workers: int = 2

    options = Command.rib().options()
    assert options == {"background": 0.27, "power": 1.3, "beta": 10.0, "log2_steps": 8, "radius": 5}
    for wrong in ({"background": -1}, {"log2_steps": 17}, {"radius": 1}, {"padded": -1}, {"power": float("nan")}):
        with pytest.raises(ValueError, match="expected"):
            WalkConfig(**wrong)


def walked(size, classes, seed=0):
    """A hill for each class, and walls between them."""
    rng = torch.Generator().manual_seed(seed)
    height, width = (-(-side // 4) for side in size)
    cams = [F.interpolate(torch.rand(1, 1, 4, 5, generator=rng), (height, width), mode="bilinear")[0, 0]
            for _ in range(classes)]  # fmt: skip
    boundary = torch.rand(height, width, generator=rng) * 0.3
    boundary[height // 2] = boundary[:, width // 3] = boundary[:, width // 2] = 0.95
    return torch.stack([torch.zeros(height, width), *cams])[1:], boundary


@pytest.mark.parametrize("config", [WalkConfig.rib(), WalkConfig(background=0.6, beta=3, log2_steps=4, radius=3)])
def test_walk_labels(config, device):
    """Written out as the released code computes it, with a dense matrix and a plane for the background."""
    size, keys = (41, 54), torch.tensor([3, 0, 8])
    cams, boundary = walked(size, 3)
    weights = reference.path_affinity(boundary[None], config.radius, config.beta)[0]
    result = reference.random_walk(cams**config.power * (1 - boundary), weights, 2**config.log2_steps)
    large = F.interpolate(result[None], scale_factor=4, mode="bilinear", align_corners=False)[0, :, :41, :54]
    planes = F.pad(large / large.max(), (0, 0, 0, 0, 1, 0), value=config.background)
    expected = torch.cat([torch.tensor([0]), keys + 1])[planes.argmax(0)]
    assert len(expected.unique()) > 2
    found = walk_labels(cams.to(device), keys, boundary.to(device), size, **config.options())
    assert found.shape == size and found.dtype == torch.uint8 and found.device.type == device
    assert (found.cpu() == expected).float().mean() > 0.998  # rounding, where two planes are nearly equal


def test_walk_labels_of_many():
    sizes, counts = [(20, 33), (17, 12), (16, 16), (1, 6)], [2, 0, 1, 1]
    cams, edges = zip(*(walked(s, c, i) for i, (s, c) in enumerate(zip(sizes, counts, strict=True))), strict=True)
    keys = [[1, 5], [], torch.tensor([253]), [0]]
    cams = [*cams[:3], cams[3] * 0]
    together = walk_labels(cams, keys, edges, sizes)
    alone = [walk_labels(*each) for each in zip(cams, keys, edges, sizes, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert [tuple(x.shape) for x in together] == sizes
    assert not together[1].any() and not together[3].any()  # no class, and a map of zeros
    assert set(together[2].unique().tolist()) <= {0, 254} and together[2].any()
    assert walk_labels([], [], [], []) == []


def test_the_walk_stops_at_boundaries():
    """A seed in the left half fills it, up to the wall and through a gap nowhere."""
    boundary, cams = torch.zeros(12, 15), torch.zeros(1, 12, 15)
    boundary[:, 7] = 1
    cams[0, 5:7, 2:4] = 1
    labels = walk_labels(cams, [4], boundary, (48, 60))
    assert (labels[:, :26] == 5).all() and not labels[:, 30:].any()


def test_walk_labels_refuse():
    cams, boundary = walked((20, 33), 2)
    for arguments, options, match in [
        (
            (cams, [1], boundary, (20, 33)),
            {},
            "cams of 1 keys and boundary with 5 x 9 positions for an image of 20 x 33",
        ),
        ((cams, [1, 2], boundary, (20, 37)), {}, "boundary with 5 x 10 positions"),
        ((cams, [1, 2], boundary[:4], (20, 33)), {}, r"got shapes \(2, 5, 9\) and \(4, 9\)"),
        ((cams, [1, 2], boundary, 20), {}, r"size to be \(H, W\)"),
        ((cams - 1, [1, 2], boundary, (20, 33)), {}, r"cams in \[0, 1\], got -"),
        ((cams * float("nan"), [1, 2], boundary, (20, 33)), {}, "finite maps"),
        ((cams, [1, 254], boundary, (20, 33)), {}, "keys from 0 to 253"),
        (([cams], [[1, 2]], [], [(20, 33)]), {}, "got 1, 0 and 1 for 1"),
        ((cams, [1, 2], boundary, (20, 33)), {"power": -1}, "power to be a finite number of at least 0"),
    ]:
        with pytest.raises(ValueError, match=f"walk_labels: expected .*{match}"):
            walk_labels(*arguments, **options)


def test_feature_affinity():
    """PSA's: by loops over pixels; and it walks."""
    features = torch.randn(6, 5, 7)
    found = feature_affinity(features, 4)
    offsets = ops.pair_offsets(4)
    assert found.shape == (len(offsets), 5, 7)
    for plane, (dy, dx) in zip(found, offsets, strict=True):
        for y in range(5):
            for x in range(7):
                inside = y + dy < 5 and 0 <= x + dx < 7
                expected = 0.0
                if inside:
                    expected = (-(features[:, y, x] - features[:, y + dy, x + dx]).abs().mean()).exp().item()
                assert plane[y, x].item() == pytest.approx(expected, rel=1e-5)
    assert not feature_affinity(features[:, :1, :2], 4)[2:].any()  # a map smaller than the radius
    halves = torch.zeros(3, 8, 8)
    halves[:, :, 4:] = 9
    cams = torch.zeros(1, 8, 8)
    cams[0, 2, 1] = 1
    spread = ops.random_walk(cams, affinity=feature_affinity(halves), beta=8)[0]
    assert spread[:, :4].min() > 0.01 and spread[:, 4:].max() < 1e-6
    with pytest.raises(ValueError, match="at least one feature"):
        feature_affinity(features[:0])
    with pytest.raises(ValueError, match="radius from 2"):
        feature_affinity(features, 1)


def test_boundaries():
    model = models.irn_network("resnet18")
    model.backbone.normalization = "symmetric"
    images = [picture(size, 1, seed)[0] for seed, size in enumerate([(33, 50), (40, 37)])]
    views = [data.make_views(image, (1.0,), data.SYMMETRIC)[0] for image in images]
    expected = model.boundaries(views, 64)
    found = boundaries(model, images, padded=64)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and not found[0].requires_grad
    single = boundaries(model, images[1], padded=64)
    torch.testing.assert_close(single, expected[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(boundaries(model, views[1], padded=64), single)
    rounded = boundaries(model, images[1], padded=64, precision="bfloat16")
    assert rounded.dtype == torch.float32 and 0 < (rounded - single).abs().max() < 0.05
    with pytest.raises(ValueError, match=r"uint8 arrays \(H, W, 3\), or views \(2, 3, H, W\)"):
        boundaries(model, [views[0][0]])
    with pytest.raises(ValueError, match="precision of float32 or bfloat16"):
        boundaries(model, images, precision="float16")
