import dataclasses
import shutil

import groups
import numpy as np
import pictures
import pytest
import torch
from torch.nn import functional as F
from trainings import backbone, lines
from trainings import source as source
from trainings import weights as weights

from ribfast import data, metrics, models
from ribfast.train import ClassifierConfig, train_classifier

SMALL = ClassifierConfig("resnet10", 2, 4, lr=0.003, momentum=0.9, long_side=(48, 72), crop=64, workers=2, device="cpu")


def test_loss_falls_and_the_checkpoint_tells_what_it_is(source, weights, tmp_path):
    seen, few = [], dataclasses.replace(source, items=source[:4])
    config = dataclasses.replace(SMALL, epochs=14, batch=9, lr=0.2, long_side=(64, 64), normalization="symmetric")
    path = train_classifier(
        source, config, tmp_path, weights=weights, validation=few, progress=lambda *facts: seen.append(facts[:2])
    )
    steps = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(14)) and seen == [(i, 14) for i in range(15)]
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert steps[4]["lr"] == pytest.approx(0.2 * (1 - 4 / 14) ** 0.9)
    checks = [line for line in lines(tmp_path) if "validation_map" in line]
    assert len(checks) == 14 and checks[-1]["validation_loss"] < checks[0]["validation_loss"]
    model = models.open_classifier(path)
    assert (model.name, model.classes, model.normalization) == ("resnet10", pictures.CLASSES, "symmetric")
    start = models.load_checkpoint(weights)
    moved = {name for name, value in model.state_dict().items() if name in start and not value.equal(start[name])}
    assert all(name.startswith(("layer3", "layer4")) for name in moved) and "layer3.0.bn1.weight" in moved
    assert "layer4.0.bn2.running_mean" not in moved
    scores = torch.stack([model(data.make_views(source.image(i), (1.0,), data.SYMMETRIC)[0]).mean((0, 2, 3))
                          for i in few]).detach()  # fmt: skip
    loss = F.multilabel_soft_margin_loss(scores, few.labels().float()).item()
    assert checks[-1]["validation_loss"] == pytest.approx(loss, rel=1e-4)
    precision = metrics.average_precision(scores, few.labels()).mean()
    assert checks[-1]["validation_map"] == pytest.approx(precision)


@pytest.mark.parametrize("network", ["resnet10", "resnet18"])  # the deeper with identity shortcuts
def test_steps_are_those_of_plain_sgd(source, network, tmp_path):
    """Written out for one epoch of two steps, with the photographs whole."""
    weights = backbone(network, tmp_path / "backbone.safetensors")
    config = dataclasses.replace(SMALL, network=network, epochs=1, long_side=(64, 64), flip=False, lr=0.01)
    path = train_classifier(source, config, tmp_path, weights=weights)
    model = models.cam_classifier(network, 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weight = models.cam_classifier(network, 2).classifier.weight.detach()
    models.load_into(model, models.load_checkpoint(weights) | {"classifier.weight": weight})
    images = torch.stack([data.make_views(source.image(i), (1.0,))[0][0] for i in source])
    order, labels, momenta = np.random.default_rng([0, 0]).permutation(9), source.labels().float(), {}
    for step in range(2):
        chosen = torch.from_numpy(order[4 * step : 4 * step + 4])
        logits = model(images[chosen]).mean((2, 3))
        loss = F.binary_cross_entropy_with_logits(logits, labels[chosen])
        model.zero_grad()
        loss.backward()
        rate = 0.01 * (1 - step / 2) ** 0.9
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.grad is not None:
                    grad = p.grad + 1e-4 * p
                    momenta[name] = grad if step == 0 else 0.9 * momenta[name] + grad
                    p -= rate * (10 if name == "classifier.weight" else 1) * momenta[name]
    trained = models.load_checkpoint(path)
    for name, value in model.state_dict().items():
        if name in trained:
            torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_resumed_training_equals_an_uninterrupted_one(source, weights, tmp_path):
    config = dataclasses.replace(SMALL, epochs=3)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = models.load_checkpoint(train_classifier(source, config, whole, weights=weights))

    def killed(done, total, text):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_classifier(source, config, broken, weights=weights, progress=killed)
    assert not (broken / "classifier.safetensors").exists()
    with pytest.raises(ValueError, match=r"an unfinished one, unfinished.safetensors; go on with it by resume"):
        train_classifier(source, config, broken, weights=weights)
    with pytest.raises(ValueError, match=r"another lr \(here 0.5, there 0.003\)"):
        train_classifier(source, dataclasses.replace(config, lr=0.5), broken, weights=weights, resume=True)
    again = dataclasses.replace(config, workers=0)
    path = train_classifier(source, again, broken, resume=True)  # which needs no weights
    found = models.load_checkpoint(path)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert sorted(p.name for p in broken.iterdir()) == ["classifier.safetensors", "metrics.jsonl"]
    strip = [
        [{k: v for k, v in line.items() if k not in ("began", "seconds")} for line in lines(out)]
        for out in (whole, broken)
    ]
    assert strip[0] == strip[1]
    modified = path.stat().st_mtime_ns
    assert train_classifier(source, config, broken, weights=weights, resume=True) == path
    assert path.stat().st_mtime_ns == modified

    def killed_at_once(done, total, text):
        raise KeyboardInterrupt

    with pytest.raises(ValueError, match=r"a finished one, classifier.safetensors; go on with it by resume"):
        train_classifier(source, config, broken, weights=weights)
    other = dataclasses.replace(config, lr=0.01)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(source, other, broken, weights=weights, overwrite=True, progress=killed_at_once)
    assert path.stat().st_mtime_ns == modified  # until the new one is whole
    train_classifier(source, other, broken, weights=weights, resume=True)
    expected = models.load_checkpoint(train_classifier(source, other, tmp_path / "other", weights=weights))
    found = models.load_checkpoint(path)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert sorted(p.name for p in broken.iterdir()) == ["classifier.safetensors", "metrics.jsonl"]


def test_whole_training_from_random_weights(source, tmp_path):
    """The trunk moves too, statistics are the first images', and both survive a pause to the bit."""
    config = dataclasses.replace(SMALL, network="resnet10", epochs=3, lr=0.01, frozen_trunk=False)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    path = train_classifier(source, config, whole)
    expected = models.load_checkpoint(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = models.cam_classifier("resnet10", 2).state_dict()
    assert all(not value.equal(start[name]) for name, value in expected.items() if name.endswith("weight"))
    rng = np.random.default_rng(0)
    images = torch.stack([config.augmentation()(source.image(source[i]), rng) for i in rng.permutation(9).tolist()])
    found = F.conv2d(images, start["conv1.weight"], None, 2, 3)
    torch.testing.assert_close(expected["bn1.running_mean"], found.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(expected["bn1.running_var"], found.var((0, 2, 3)), rtol=1e-4, atol=1e-4)
    model = models.open_classifier(path)
    assert model.name == "resnet10" and not model.trunk(images).requires_grad  # frozen again for what follows

    def killed(done, total, text):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_classifier(source, config, broken, progress=killed)
    with pytest.raises(ValueError, match=r"another frozen_trunk \(here True, there False\)"):
        train_classifier(source, dataclasses.replace(config, frozen_trunk=True), broken, resume=True)
    again = models.load_checkpoint(train_classifier(source, config, broken, resume=True))
    assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in again)


def test_whole_training_from_weights_keeps_their_statistics(source, weights, tmp_path):
    config = dataclasses.replace(SMALL, epochs=1, frozen_trunk=False)
    found = models.load_checkpoint(train_classifier(source, config, tmp_path, weights=weights))
    start = models.load_checkpoint(weights)
    moved = {name for name in found if name in start and not found[name].equal(start[name])}
    assert {"conv1.weight", "layer1.0.bn1.weight", "layer4.0.conv2.weight"} <= moved
    assert not any("running" in name for name in moved)


def test_measured_statistics_normalise_every_layer():
    torch.manual_seed(0)
    for name in ("resnet10", "mobilenet_v2"):
        model, images = models.cam_classifier(name, 2), torch.randn(6, 3, 40, 52) * 3 + 1
        model.measure(images)
        seen = []

        def see(module, inputs, output, seen=seen):
            seen.append(output.clone())

        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.register_forward_hook(see)
        with torch.no_grad():
            model(images)
        assert len(seen) > 10 and not model.training
        for output in seen:
            assert output.mean((0, 2, 3)).abs().max() < 1e-3
            assert (output.var((0, 2, 3)) - 1).abs().max() < 0.05


@pytest.mark.processes
@pytest.mark.parametrize("frozen", [True, False])
def test_two_processes_share_each_batch(source, weights, tmp_path, frozen):
    command = ["-m", "ribfast", "train-classifier", "--data", f"folder:{source[0].image.parents[1]}"]
    command += ["--weights", str(weights), "--out", str(tmp_path / "two"), "--network", "resnet10", "--epochs", "2"]
    command += ["--batch", "4", "--lr", "0.003", "--momentum", "0.9", "--long-side", "48,72", "--crop", "64"]
    command += ["--device", "cpu", "--workers", "1", *(["--no-frozen-trunk"] * (not frozen))]
    with groups.ranks(*command) as children:
        config = dataclasses.replace(SMALL, frozen_trunk=frozen)
        alone = train_classifier(source, config, tmp_path / "one", weights=weights)
        for code, _, said in groups.ended(children):
            assert code == 0, said[-2000:]
    found, expected = models.load_checkpoint(tmp_path / "two" / "classifier.safetensors"), models.load_checkpoint(alone)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=2e-5, msg=name)
    both = [[line["loss"] for line in lines(tmp_path / name)] for name in ("one", "two")]
    assert both[0] == pytest.approx(both[1], rel=1e-3)


def test_an_empty_validation_is_named(source, tmp_path):
    nothing = dataclasses.replace(source, items=())
    with pytest.raises(ValueError, match="expected at least one image, got none; fill the list"):
        train_classifier(source, SMALL, tmp_path, validation=nothing)
    assert not list(tmp_path.iterdir())


def test_bfloat16_and_fewer_images_than_a_batch(source, tmp_path):
    config = dataclasses.replace(SMALL, network="mobilenet_v2", tensorflow_padding=True, batch=100, epochs=1)
    config = dataclasses.replace(config, precision="bfloat16", normalization="symmetric")
    path = train_classifier(source, config, tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [0]
    model = models.open_classifier(path)
    assert model.tensorflow_padding and model.normalization == "symmetric"
    assert all(value.dtype == torch.float32 for value in models.load_checkpoint(path).values())


def test_refuses_what_cannot_train(source, weights, tmp_path):
    unlabelled = dataclasses.replace(source, items=tuple(dataclasses.replace(i, classes=()) for i in source))
    with pytest.raises(ValueError, match="expected images with labels, got 9 without any"):
        train_classifier(unlabelled, SMALL, tmp_path)
    squares = dataclasses.replace(source, items=tuple(i for i in source if 1 not in i.classes))
    with pytest.raises(ValueError, match="expected images of every class, got none of disc"):
        train_classifier(squares, SMALL, tmp_path)
    with pytest.raises(ValueError, match="validation split of the same classes"):
        train_classifier(source, SMALL, tmp_path, validation=dataclasses.replace(source, classes=("disc", "square")))
    with pytest.raises(FloatingPointError, match=r"expected a finite loss, got (nan|inf) in step \d; lower lr"):
        train_classifier(source, dataclasses.replace(SMALL, lr=1e9), tmp_path, weights=weights)
    with pytest.raises(ValueError, match=r"a resnet10, got .*, a .* without"):
        other = tmp_path / "other.safetensors"
        models.save_checkpoint(other, models.cam_classifier("mobilenet_v2", 2).state_dict())
        train_classifier(source, SMALL, tmp_path, weights=other)
    for field, value in {"epochs": 0, "lr": -1.0, "crop": 0, "momentum": float("nan")}.items():
        with pytest.raises(ValueError, match=f"expected {field} of at least"):
            dataclasses.replace(SMALL, **{field: value})
    with pytest.raises(ValueError, match="tensorflow_padding with mobilenet_v2"):
        ClassifierConfig(tensorflow_padding=True)
    broken = tmp_path / "broken"
    shutil.copytree(source[0].image.parents[1], broken)
    (broken / "images" / "p3.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"p3\.png"):
        train_classifier(data.open_source(f"folder:{broken}"), SMALL, tmp_path)


def test_average_precision():
    scores = torch.tensor([[0.9, 1.0, 0], [0.8, 1.0, 0], [0.7, 1.0, 0], [0.6, 1.0, 0]])
    labels = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0]]).bool()
    found = metrics.average_precision(scores, labels)
    assert found[0] == pytest.approx((1 + 2 / 3) / 2) and found[1] == pytest.approx(1 / 4) and found[2] != found[2]
