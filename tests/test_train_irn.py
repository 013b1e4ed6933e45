import dataclasses
import os
import sys

import cv2
import groups
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from trainings import lines
from trainings import source as source
from trainings import weights as weights

from ribfast import data, models, ops
from ribfast.masks import boundaries
from ribfast.train import IrnConfig, train_irn
from ribfast.train.irn import irn_losses

SMALL = IrnConfig("resnet10", 2, 4, lr=0.02, momentum=0.9, rescale=(0.5, 0.8), crop=32, radius=4, workers=2,
                  device="cpu")  # fmt: skip


@pytest.fixture(scope="module")
def labels(source):
    """The masks, with unknown pixels in a corner."""
    found = {item.name: source.mask(item).copy() for item in source}
    for mask in found.values():
        mask[:9, :12] = 255
    return found


def gathered_losses(boundary, displacement, labels, radius):
    """IRN's four losses by tables of pixels' numbers, as its released code goes about it."""
    height, width = labels.shape[1:]
    side = radius - 1
    begin = torch.arange(height * width).view(height, width)[: height - side, side : width - side].flatten()
    affinities, moves, ends, wanted = [], [], [], []
    for y, x in ops.pair_offsets(radius):
        cells = []
        for v in range(min(0, y), max(0, y) + 1):
            for u in range(min(0, x), max(0, x) + 1):
                along = min(1, max(0, (v * y + u * x) / (y * y + x * x)))
                if (v - along * y) ** 2 + (u - along * x) ** 2 < 1:
                    cells.append(begin + v * width + u)
        edges = boundary.flatten(1)[:, torch.stack(cells)]  # (N, cells, pairs)
        affinities.append(1 - edges.max(1).values)
        end = begin + y * width + x
        moves.append(displacement.flatten(2)[..., begin] - displacement.flatten(2)[..., end])
        ends.append(end)
        wanted.append(torch.tensor([y, x], dtype=displacement.dtype))
    affinity, move, end = torch.stack(affinities, 1), torch.stack(moves, 2), torch.stack(ends)
    wanted = torch.stack(wanted, 1)[None, :, :, None]
    flat = labels.flatten(1).long()
    here, there = flat[:, begin][:, None], flat[:, end]
    valid = (here < 21) & (there < 21)
    alike = valid & (here == there)
    background, foreground = (alike & (here == 0)).float(), (alike & (here > 0)).float()
    other = (valid & (here != there)).float()
    positive = -(affinity + 1e-5).log()
    of_background = (background * positive).sum() / (background.sum() + 1e-5)
    of_foreground = (foreground * positive).sum() / (foreground.sum() + 1e-5)
    negative = -(other * (1 + 1e-5 - affinity).log()).sum() / (other.sum() + 1e-5)
    far = ((move - wanted).abs() * foreground[:, None]).sum() / (2 * foreground.sum() + 1e-5)
    still = (move.abs() * background[:, None]).sum() / (2 * background.sum() + 1e-5)
    return ((of_background / 2 + of_foreground / 2) + negative) / 2 + (far + still) / 2


def test_the_loss_is_the_released_one(device):
    labels = torch.zeros(3, 13, 15, dtype=torch.uint8)
    labels[0, 4:9, 3:11], labels[0, 6:12, 8:13] = 3, 5
    labels[1, :, 7:], labels[1, :3] = 2, 255
    labels[2] = 255  # an image of which nothing is known
    boundary = torch.rand(3, 13, 15).requires_grad_()
    displacement = torch.randn(3, 2, 13, 15).requires_grad_()
    expected = gathered_losses(boundary, displacement, labels, 5)
    gradients = torch.autograd.grad(expected, (boundary, displacement))
    inputs = [t.detach().to(device).requires_grad_() for t in (boundary, displacement)]
    sums = ops.pair_losses(*inputs, labels.to(device), 5)
    found = irn_losses(sums[:5], sums[5:].detach())
    torch.testing.assert_close(found["loss"].cpu(), expected, rtol=1e-5, atol=1e-6)
    total = (found["positive"] + found["negative"]) / 2 + found["displacement"] / 2
    assert torch.equal(total, found["loss"])
    for own, other in zip(torch.autograd.grad(found["loss"], inputs), gradients, strict=True):
        torch.testing.assert_close(own.cpu(), other, rtol=1e-4, atol=1e-6)
    sums = ops.pair_losses(*inputs, torch.full_like(labels, 255).to(device), 5)
    assert irn_losses(sums[:5], sums[5:])["loss"] == 0


def two_regions(folder):
    """Pictures of two regions whose border lies elsewhere in each, and their masks."""
    rng, rows, masks = np.random.default_rng(0), ["image,labels"], {}
    (folder / "images").mkdir(parents=True)
    for i in range(4):
        mask = np.zeros((64, 64), np.uint8)
        mask[:, int(rng.integers(20, 44)) :] = 1
        masks[f"p{i}"] = mask = mask.T if i % 2 else mask
        picture = np.where(mask[..., None] > 0, (40, 60, 200), (120, 110, 100)) + rng.integers(0, 20, (64, 64, 3))
        cv2.imwrite(str(folder / "images" / f"p{i}.png"), picture.astype(np.uint8))
        rows.append(f"p{i},red")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return data.open_source(f"folder:{folder}"), masks


def test_boundaries_are_learned(weights, tmp_path):
    (source, masks), seen = two_regions(tmp_path / "data"), []
    often = dataclasses.replace(source, items=source.items * 8)
    config = dataclasses.replace(SMALL, epochs=3, lr=0.03, crop=64, rescale=(1.0, 1.0))
    path = train_irn(often, masks, config, tmp_path, weights=weights, progress=lambda *facts: seen.append(facts[:2]))
    steps = lines(tmp_path)
    assert [line["step"] for line in steps] == list(range(24)) and seen == [(i, 24) for i in range(25)]
    first, last = ({k: np.mean([line[k] for line in part]) for k in part[0]} for part in (steps[:4], steps[-4:]))
    assert last["loss"] < 0.6 * first["loss"] and last["displacement"] < 0.6 * first["displacement"]
    assert last["positive"] + last["negative"] < 0.7 * (first["positive"] + first["negative"])
    assert steps[5]["lr"] == pytest.approx(0.03 * (1 - 5 / 24) ** 0.9)
    model = models.open_irn(path)
    assert not model.training and model.branches.mean_shift.running_mean.abs().min() > 0
    start, trained = models.load_checkpoint(weights), model.tensors()
    assert len(start) > 50 and all(
        torch.equal(trained[name], value) for name, value in start.items() if name in trained
    )
    assert model.crop == 64
    found = boundaries(model, [source.image(item) for item in source])
    for item, boundary in zip(source, found, strict=True):
        mask = masks[item.name]
        rim = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8))[::4, ::4] > 0
        inside = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((17, 17), np.uint8))[::4, ::4] == 0
        assert boundary[torch.from_numpy(rim)].mean() > boundary[torch.from_numpy(inside)].mean() + 0.3


def test_steps_are_those_of_plain_sgd(source, labels, weights, tmp_path):
    """Written out for one epoch of two steps, with the photographs whole; and the mean displacement after them."""
    config = dataclasses.replace(SMALL, epochs=1, crop=64, rescale=(1.0, 1.0), flip=False, displacement_lr_scale=3.0)
    path = train_irn(source, labels, config, tmp_path, weights=weights)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.irn_network("resnet10").train()
    model.fill(models.load_checkpoint(weights), branches=False)
    images = torch.stack([data.make_views(source.image(i), (1.0,))[0][0] for i in source])
    reduced = torch.stack([torch.from_numpy(labels[i.name][2::4, 2::4].copy()) for i in source])
    order, momenta = np.random.default_rng([0, 0]).permutation(9), {}
    for step in range(2):
        chosen = torch.from_numpy(order[4 * step : 4 * step + 4])
        boundary, displacement = model(images[chosen])
        loss = gathered_losses(boundary[:, 0].sigmoid(), displacement, reduced[chosen], 4)
        assert lines(tmp_path)[step]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        model.zero_grad()
        loss.backward()
        rate = 0.02 * (1 - step / 2) ** 0.9
        with torch.no_grad():
            for name, p in model.branches.named_parameters():
                grad = p.grad + 1e-4 * p
                momenta[name] = grad if step == 0 else 0.9 * momenta[name] + grad
                p -= rate * (3 if name.startswith("fc_dp") else 1) * momenta[name]
    with torch.no_grad():
        model.branches.mean_shift.running_mean.copy_(model(images)[1].mean((0, 2, 3)))
    trained = models.load_checkpoint(path)
    assert trained.keys() == model.tensors().keys()
    for name, value in model.tensors().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_labels_follow_their_image():
    """An image that shows its own labels: after any scale, mirror and crop, both still agree."""
    config = IrnConfig(rescale=(0.4, 2.5), crop=96)
    labels = np.kron(np.arange(12, dtype=np.uint8).reshape(3, 4), np.ones((20, 20), np.uint8))
    image = np.repeat(labels[..., None] * 20, 3, 2)
    plain = data.Normalization((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
    augmentation = dataclasses.replace(config.augmentation(), normalization=plain)
    for seed in range(20):
        crop, found = augmentation.with_labels(image, labels, np.random.default_rng(seed))
        assert crop.shape == (3, 96, 96) and found.shape == (96, 96) and found.dtype == torch.uint8
        assert torch.equal(crop, augmentation(image, np.random.default_rng(seed)))
        inside = found != 255
        flat = F.max_pool2d(found[None].float(), 9, 1, 4) == -F.max_pool2d(-found[None].float(), 9, 1, 4)
        assert (crop[:, ~inside] == 0).all() and (inside & flat[0]).any()
        assert (crop[0] - 20 * found)[inside & flat[0]].abs().max() <= 1  # bicubic, far from edges
    grid = torch.arange(60.0)[None, None]
    for wanted in (24, 59, 60, 61, 150):  # of each pixel, the nearest by its centre
        one = dataclasses.replace(augmentation, rescale=(wanted / 60,) * 2, crop=wanted, flip=False)
        row = np.arange(60, dtype=np.uint8)[None].repeat(60, 0)
        _, found = one.with_labels(np.zeros((60, 60, 3), np.uint8), row, np.random.default_rng(0))
        assert torch.equal(found[0].float(), F.interpolate(grid, wanted, mode="nearest-exact")[0, 0])
    with pytest.raises(ValueError, match=r"labels in uint8 of the image's size \(60, 80\), got uint8 \(60, 60\)"):
        augmentation.with_labels(image, row, np.random.default_rng(0))
    with pytest.raises(ValueError, match="either long_side or rescale"):
        data.Augmentation(rescale=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"0 < rescale\[0\] <= rescale\[1\]"):
        data.Augmentation(None, rescale=(1.5, 0.5))


def test_resumed_training_equals_an_uninterrupted_one(source, labels, weights, tmp_path):
    config, whole, broken, folder = dataclasses.replace(SMALL, epochs=3), *map(tmp_path.joinpath, ("a", "b", "c"))
    folder.mkdir()
    for name, mask in labels.items():
        cv2.imwrite(str(folder / f"{name}.png"), mask)
    expected = models.load_checkpoint(train_irn(source, labels, config, whole, weights=weights))

    def killed(done, total, text):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_irn(source, folder, config, broken, weights=weights, progress=killed)
    assert not (broken / "irn.safetensors").exists()
    with pytest.raises(ValueError, match=r"train_irn: expected to go on as .* another radius \(here 3, there 4\)"):
        train_irn(source, folder, dataclasses.replace(config, radius=3), broken, resume=True)
    other = dataclasses.replace(source, items=source[1:])
    with pytest.raises(ValueError, match=r"train_irn: expected to go on as .* another data"):
        train_irn(other, folder, config, broken, resume=True)
    again = dataclasses.replace(config, workers=0)
    path = train_irn(source, labels.__getitem__, again, broken, resume=True)  # which needs no weights
    found = models.load_checkpoint(path)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert sorted(p.name for p in broken.iterdir()) == ["irn.safetensors", "metrics.jsonl"]
    strip = [
        [{k: v for k, v in line.items() if k not in ("began", "seconds")} for line in lines(out)]
        for out in (whole, broken)
    ]
    assert strip[0] == strip[1]
    modified = path.stat().st_mtime_ns
    assert train_irn(source, labels, config, broken, weights=weights, resume=True) == path
    assert path.stat().st_mtime_ns == modified


def test_what_follows_the_last_epoch_is_made_up_for(source, labels, weights, tmp_path, monkeypatch):
    """A run that is cut off before the mean displacement is known trains no epoch again."""

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(models, "irn_network", lambda name, **o: models.IRNet(models.cam_classifier(name, 1, **o)))
        patch.setattr(models.IRNet, "eval", killed)
        train_irn(source, labels, SMALL, tmp_path, weights=weights)
    before = models.load_checkpoint(tmp_path / "unfinished.safetensors")
    path = train_irn(source, labels, SMALL, tmp_path, resume=True, progress=lambda *facts: pytest.fail("a step"))
    found = models.load_checkpoint(path)
    assert found.pop("mean_shift.running_mean").abs().min() > 0
    assert all(torch.equal(value, before[f"model.{name}"]) for name, value in found.items())
    assert len(lines(tmp_path)) == 4


CHILD = """
import sys
from pathlib import Path
from test_train_irn import SMALL
from ribfast import data
from ribfast.train import train_irn
spec, labels, weights, out = sys.argv[1:]
train_irn(data.open_source(spec), labels, SMALL, out, weights=weights)
"""


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:.broadcast_buffers:FutureWarning")
def test_two_processes_share_each_batch(source, labels, weights, tmp_path, monkeypatch):
    for name, mask in labels.items():
        cv2.imwrite(str(tmp_path / f"{name}.png"), mask)
    out, path = tmp_path / "two", os.pathsep.join(filter(None, sys.path))
    words = ["-c", CHILD, f"folder:{source[0].image.parents[1]}", tmp_path, weights, out]
    with groups.free_port() as port:
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        with groups.started((words, groups.environment(**group, RANK="1", PYTHONPATH=path))) as children:
            alone = train_irn(source, labels, SMALL, tmp_path / "one", weights=weights)
            with monkeypatch.context() as patch:
                for name, value in {**group, "RANK": "0"}.items():
                    patch.setenv(name, value)
                together = train_irn(source, labels, SMALL, out, weights=weights)
            ((code, _, said),) = groups.ended(children)
    assert code == 0, said[-2000:]
    found, expected = models.load_checkpoint(together), models.load_checkpoint(alone)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)
    both = [[line["loss"] for line in lines(tmp_path / name)] for name in ("one", "two")]
    assert both[0] == pytest.approx(both[1], rel=1e-3)


def test_bfloat16_and_fewer_images_than_a_batch(source, labels, tmp_path):
    config = dataclasses.replace(SMALL, network="mobilenet_v2", tensorflow_padding=True, batch=100, epochs=1)
    config = dataclasses.replace(config, precision="bfloat16", normalization="symmetric")
    path = train_irn(source, labels, config, tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [0]
    model = models.open_irn(path)
    assert model.backbone.tensorflow_padding and model.normalization == "symmetric"
    assert all(value.dtype == torch.float32 for value in models.load_checkpoint(path).values())


def test_refuses_what_cannot_train(source, labels, weights, tmp_path):
    some = {name: mask for name, mask in labels.items() if name not in ("p2", "p5")}
    with pytest.raises(ValueError, match="expected labels of 9 images in the mapping, got none of p2, p5; make"):
        train_irn(source, some, SMALL, tmp_path)
    with pytest.raises(ValueError, match=r"expected labels of 9 images in .*, got none of p0, p1, p2 and 6 more"):
        train_irn(source, tmp_path, SMALL, tmp_path)
    with pytest.raises(ValueError, match=r"p0: scan: expected a mask .* in uint8, got int64"):
        train_irn(source, {name: mask.astype(np.int64) for name, mask in labels.items()}, SMALL, tmp_path)
    with pytest.raises(ValueError, match="expected images, got none"):
        train_irn(dataclasses.replace(source, items=()), labels, SMALL, tmp_path)
    with pytest.raises(FloatingPointError, match=r"train_irn: expected (a finite loss|finite weights), got .* lower"):
        train_irn(source, labels, dataclasses.replace(SMALL, lr=1e30), tmp_path, weights=weights)
    other = tmp_path / "classifier.safetensors"
    classifier = models.cam_classifier("resnet10", 2)
    classifier.normalization = "symmetric"
    models.save_checkpoint(other, classifier.state_dict(), classifier.metadata())
    with pytest.raises(ValueError, match=r"weights for normalization imagenet, got .*, trained with symmetric; set"):
        train_irn(source, labels, SMALL, tmp_path, weights=other)
    for field, value in {"epochs": 0, "lr": -1.0, "displacement_lr_scale": -1.0, "momentum": float("nan")}.items():
        with pytest.raises(ValueError, match=f"IrnConfig: expected {field} of at least"):
            dataclasses.replace(SMALL, **{field: value})
    for crop, radius in ((50, 4), (24, 4), (72, 10)):
        with pytest.raises(ValueError, match=f"crop to be a multiple of 4 of at least {4 * (2 * radius - 1)}"):
            IrnConfig(crop=crop, radius=radius)
    with pytest.raises(ValueError, match="radius from 2 to 16, got 17"):
        IrnConfig(radius=17)
    with pytest.raises(ValueError, match="tensorflow_padding with mobilenet_v2"):
        IrnConfig(tensorflow_padding=True)
    assert IrnConfig.released() == IrnConfig() and IrnConfig.small().batch < 32
